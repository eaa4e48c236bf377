"""What tests share: models, programs, runs, servers. No test lives here, and no test module imports another."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "montessori_core" / "presets"
