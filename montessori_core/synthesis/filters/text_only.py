"""The filter `text_only`: is text enough to read and to answer an instruction?

The authors' code rejects every instruction with a word such as "file" or "draw" (the filter `words`), so also "a function
that reads a file" and "draw up a budget". These patterns look for what is asked: to make, read or play something that is not
text. They know English only. `tests/unit/test_text_only.py` compares both with 260 instructions judged by hand.
"""

import re
from functools import cache

from montessori_core.config.filters import TextOnlyFilter
from montessori_core.synthesis.filters.filter import Context, Filter, Reject

_ASKS = r"(?:^|[.!?:;,][\"'”’]?\s+|\b(?:and|then|please|you|you to)\s+)"
"""Where a request begins. "Write code that draws" or "how to draw" does not ask to draw."""
_MADE = r"(?:create|make|generate|produce|design|prepare|provide|build|construct|render|show|give|add|include|insert)"
_NEW = (  # "me a colourful", but no preposition: "tips for better photos" are not photos
    r"\s+(?:me\s+|us\s+)?(?:(?!(?:of|for|to|about|that|in|on|with|from|and|how|road|site|big|file)\b)[\w'-]+\s+){0,4}"
)
_GIVEN = r"(?:this|these|that|the|my|both)(?:\s+(?!of\b)[\w'-]+){0,2}\s+"
_ABOUT = (
    r"(?!\s+(?:scripts?|titles?|captions?|descriptions?|ideas?|names?|calls?|games?|prompts?|formulas?|formats?)\b)"
)
_VISUAL = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|paintings?|illustrations?|sketch(?:es)?|diagrams?|graphs?|charts?|"
    r"maps?|videos?|video\s+clips?|audio|recordings?|screenshots?|scatter\s*plots?|box\s*plots?)\b" + _ABOUT
)
_NEW_VISUAL = (
    rf"(?:{_VISUAL}|(?:logos?|posters?|infographics?|flow\s?charts?|cartoons?|comic\s+strips?|animations?|memes?|portraits?|"
    rf"business\s+cards?|wallpapers?)\b{_ABOUT})"
)
_OLD_VISUAL = rf"(?:{_VISUAL}|(?:figures?|podcasts?|songs?)\b{_ABOUT})"
_FILE = (
    r"(?:files?|pdfs?|spreadsheets?|documents?|attachments?|archives?|folders?|data\s?sets?|power\s?points?|"
    r"presentations?|slide\s?decks?)\b" + _ABOUT
)
_FILE_NAME = r"[\w-]+\.(?:txt|csv|tsv|json|pdf|docx?|xlsx?|pptx?|zip|py|xml|html?|png|jpe?g|mp[34]|wav)\b"
_INLINE = r"(?!\s*:\s*\S)"  # the text follows the colon

_NEEDS = {
    "needs images or sound": (
        # Not "draw up", "draw on", "draw a conclusion", "draw attention", "draw an ASCII cat".
        rf"{_ASKS}(?:draw|sketch|paint|colou?r\s+(?:in\s+)?the)\b(?!\s+(?:up|on|upon|from|attention|inspiration|out)\b)"
        r"(?!(?:\s+[\w'-]+){0,2}\s+(?:conclusions?|comparisons?|distinctions?|parallels?|inferences?|lessons?|contrasts?|"
        r"analog(?:y|ies)|connections?|line\s+between|ascii|consequences?)\b)(?![^.!?]{0,80}\b(?:in|with)\s+words\b)",
        rf"{_ASKS}{_MADE}{_NEW}{_NEW_VISUAL}",
        rf"{_ASKS}(?:plot|graph)\s+(?:the|a|an|this|these|each|y|f|x)\b(?!\s+(?:story|course|novel|murder|escape)\b)",
        rf"{_ASKS}visuali[sz]e\s+(?:the|this|these)\b",
        rf"{_ASKS}illustrate\b[^.!?]{{0,60}}\bwith\s+(?:a\s+|some\s+)?{_VISUAL}",
        rf"\b(?:this|these|following|attached|given|provided|uploaded|accompanying)\s+(?:[\w'-]+\s+)?{_OLD_VISUAL}{_INLINE}",
        rf"\b{_OLD_VISUAL}\s+(?:below|above|attached|provided|shown|given)\b",
        rf"{_ASKS}(?:look\s+(?:closely\s+)?at|listen\s+to|watch|view|examine|study|refer\s+to|use|consult)\s+the\s+"
        rf"(?:[\w'-]+\s+)?{_OLD_VISUAL}",
        rf"\b(?:using|based\s+on|according\s+to)\s+the\s+(?:[\w'-]+\s+)?{_OLD_VISUAL}",
        r"\b(?:what|who|which|where|how\s+many|identify|describe|count|find|see)\b[^.!?]{0,60}\bin\s+the\s+"
        r"(?:image|picture|photo|photograph|video|diagram|figure|drawing)\b(?!\s+(?:on|of|by|game)\b)",
        r"\bwhat\s+(?:does|do|can)\s+the\s+(?:[\w'-]+\s+)?(?:image|picture|photo|graph|chart|map|diagram|figure|video)s?\s+"
        r"(?:show|tell|depict|represent|illustrate)\b",
        rf"{_ASKS}(?:sing|hum|animate|film|photograph|transcribe)\s+(?:me\s+)?(?:the|a|an|this|your)\b(?!\s+praises?\b)",
        rf"{_ASKS}play\s+(?:me\s+)?(?:a|the|some|this)\s+(?:[\w'-]+\s+)?(?:songs?|tunes?|pieces?|music|tracks?|melody)\b",
        rf"{_ASKS}record\s+(?:yourself|a\s+(?:short\s+)?(?:video|song|voice|message))\b",
        rf"{_ASKS}take\s+(?:a|some)\s+(?:photos?|pictures?|screenshots?|selfies?)\b",
    ),
    "needs files": (
        rf"\b(?:attached|uploaded|following|given|provided)\s+(?:[\w'-]+\s+)?{_FILE}{_INLINE}",
        rf"\b{_FILE}\s+(?:attached|provided|(?:below|above)(?=\s*(?:[.,;:?!]|$|and\b|to\b)))",
        r"\bsee\s+(?:the\s+)?attach(?:ment|ed)|\bin\s+the\s+attachment\b|\bthe\s+(?:attached|uploaded)\s+\w",
        rf"{_ASKS}(?:open|read|load|edit|run|execute|import|merge|unzip|extract|convert|print|scan|delete|rename|copy|parse)\s+"
        rf"(?:{_GIVEN}|the\s+){_FILE}",
        rf"{_ASKS}(?:open|read|load|edit|run|execute|import|parse)\s+{_FILE_NAME}",
        rf"{_ASKS}(?:save|export|store)\b[^.!?]{{0,40}}\b(?:to|in|into|as)\s+(?:an?\s+|the\s+)?(?:[\w'-]+\s+){{0,2}}(?:{_FILE}|{_FILE_NAME})",
        rf"{_ASKS}(?:analy[sz]e|summari[sz]e|compare|count|find|use)\b[^.!?]{{0,40}}\bin\s+the\s+(?:excel\s+sheet|{_FILE}){_INLINE}",
        rf"{_ASKS}(?:upload|download|unzip)\s+(?:the|a|an|your|this|my)\b",
        rf"{_ASKS}{_MADE}{_NEW}(?:excel|power\s?point|spreadsheets?|pdfs?|word\s+documents?|slide\s?decks?)\b{_ABOUT}",
    ),
    "needs the web": (
        rf"{_ASKS}(?:search|browse|surf)\s+(?:the\s+)?(?:web|internet|net|online)\b|{_ASKS}(?:use\s+)?google\s+(?:to|for|the)\b",
        rf"{_ASKS}(?:search|look|find)\b[^.!?]{{0,60}}\b(?:online|on\s+the\s+(?:web|internet))\b",
        rf"{_ASKS}look\s+up\s",
        rf"{_ASKS}(?:go\s+to|visit|open|check|click(?:\s+on)?)\s+(?:https?:|(?:the|this|that)\s+(?:[\w'-]+\s+)?"
        r"(?:web\s?sites?|web\s?pages?|links?|url|site)\b)",
        rf"{_ASKS}(?:give|send|provide)\s+(?:me\s+)?(?:a\s+|the\s+|some\s+)?links?\s+to\b",
        r"\b(?:current|latest|live|today['’]s|recent|up-to-date)\s+(?:[\w'-]+\s+){0,2}(?:price|weather|news|headlines?|"
        r"exchange\s+rate|stock|scores?|temperature|traffic)\b",
        r"\bwho\s+won\s+(?:the\s+)?(?:yesterday|today|tonight|last\s+night)|^what\s+time\s+is\s+it\b",
        r"\b(?:trending|most\s+(?:viewed|watched|popular|read))\b[^.!?]{0,60}\b(?:right\s+now|today|this\s+(?:week|month))\b",
        rf"{_ASKS}(?:book|reserve)\s+(?:me\s+)?an?\s+(?:table|flight|room|ticket|hotel|taxi)\b",
        rf"{_ASKS}post\s+(?:an?|this|the)\s+(?:tweet|comment|message|photo|status)\b",
        rf"{_ASKS}(?:check|open|read)\s+my\s+(?:inbox|e-?mails?|calendar|messages)\b",
    ),
}


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """Return the pattern of each need; compiling them takes 20 ms, which every start of the driver would pay."""
    return {need: re.compile("|".join(patterns), re.IGNORECASE) for need, patterns in _NEEDS.items()}


def need_beyond_text(instruction: str) -> str | None:
    """Return what an instruction needs in addition to text, as a reason; None if text is enough."""
    return next((need for need, pattern in _patterns().items() if pattern.search(instruction)), None)


def _open(settings: TextOnlyFilter, context: Context) -> Reject:
    return lambda candidate: need_beyond_text(candidate.instruction)


TEXT_ONLY = Filter("text_only", "Instructions that text alone can answer.", _open, TextOnlyFilter)
