"""`python -m agent.update`: print the update machine's table and diagram as Markdown."""

import sys

from agent.update.diagram import markdown

sys.stdout.write(markdown())
