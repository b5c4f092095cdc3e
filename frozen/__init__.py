"""Parts of prepare.py that stand alone: never edited during a run, and covered by the rules' hash like prepare.py."""
