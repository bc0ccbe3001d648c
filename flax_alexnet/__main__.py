import sys

from flax_alexnet.cli import main

sys.exit(main())
