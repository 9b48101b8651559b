"""`python -m analytics ROLE [ROLE...]`."""

from analytics.bootstrap import SERVICE
from kehu.runtime import main

if __name__ == "__main__":
    main(SERVICE)
