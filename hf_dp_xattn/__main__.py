"""`python -m hf_dp_xattn` is `hf-dp-xattn`."""

import sys

from .cli import main

sys.exit(main())
