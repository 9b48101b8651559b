"""`python -m scoring ROLE [ROLE...]`."""

from kehu.runtime import main
from scoring.bootstrap import SERVICE

if __name__ == "__main__":
    main(SERVICE)
