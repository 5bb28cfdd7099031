"""`python -m keras_das`."""

import sys

from keras_das.cli import main

sys.exit(main())
