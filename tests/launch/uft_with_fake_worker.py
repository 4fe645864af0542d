"""`uft WORDS` whose worker is the stand-in of fake_worker.py."""

import sys
from pathlib import Path

from uft.cli import main
from uft.launch import process

process.COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
sys.exit(main(sys.argv[1:]))
