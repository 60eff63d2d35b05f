"""placeholder"""


def write(run_dir):
    pass
