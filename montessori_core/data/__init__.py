"""Tables, the human-written sets, and how texts are compared."""
