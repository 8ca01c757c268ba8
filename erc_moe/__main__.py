"`python -m erc_moe` is the command `erc_moe`."
import sys
from erc_moe.cli import main

if __name__ == "__main__": sys.exit(main())
