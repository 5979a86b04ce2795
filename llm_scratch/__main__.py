"`python -m llm_scratch` is the command line `llm-scratch`."
from .pipeline import main

if __name__ == '__main__': main()
