import sys

from wuerstchen.cli import main

sys.exit(main())
