"`python -m ldm_edu` is `ldm-edu`; so `accelerate launch -m ldm_edu train …` starts several processes."

from ldm_edu.cli import app

if __name__ == "__main__":
    app(prog_name="ldm-edu")
