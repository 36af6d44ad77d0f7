"""`python -m rnn_ext info | check | bench`."""

import sys

from rnn_ext._cli import main

if __name__ == "__main__":
    sys.exit(main())
