"""`python -m lead_intake ROLE [ROLE...]`"""

from kehu.runtime import main
from lead_intake.bootstrap import SERVICE

if __name__ == "__main__":
    main(SERVICE)
