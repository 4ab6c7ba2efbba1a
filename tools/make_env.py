"""Make or refresh the course's virtual environment: ``python3 tools/make_env.py [--venv .venv]``.

Standard library only, and no syntax newer than Python 3.6: an interpreter that is too old must get as far
as the sentence that says so. Three states are told apart by two files inside the environment:

* ``drs-ready`` holds a hash of pyproject.toml: installed for exactly this project file, nothing to do;
* ``drs-unfinished`` was left by a run that was killed: nothing in there can be trusted, it is made anew
  (pip takes what it had downloaded from its cache);
* neither: an environment that somebody else made, or one whose last installation failed in an orderly way.
  pip is run on it again.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OLDEST = (3, 10)
READY = "drs-ready"
UNFINISHED = "drs-unfinished"
OURS = "drs-made"  # only an environment that this script made may be deleted without being asked
CRF_LOG = "drs-crf-build.log"
HELD = []  # the open lock file: closing it would release the lock


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Make or refresh the course's virtual environment.")
    parser.add_argument("--venv", default=".venv", help="where it is (default: .venv)")
    parser.add_argument("--project", default=".", help="folder with pyproject.toml (default: this folder)")
    parser.add_argument("--retry-crf", action="store_true", help="build the optional CRF package again")
    parser.add_argument("--remove", action="store_true", help="delete the environment")
    options = parser.parse_args(arguments)
    if options.remove:
        remove(options.venv)
        return
    if sys.version_info < OLDEST:
        stop(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and {sys.executable} is "
            f"{sys.version_info[0]}.{sys.version_info[1]}. Name a newer one, for example: "
            "make test PYTHON=python3.12"
        )
    wanted = fingerprint(options.project)
    ready = os.path.join(options.venv, READY)
    installed = read(ready) == wanted
    if installed and not options.retry_crf:
        os.utime(ready)  # make compares times: a file that was only checked out again is not a change
        return
    python = interpreter(options.venv)
    prepare(options.venv, python)
    if not installed:
        install(options.venv, python, options.project)
    install_crf(options.venv, python, options.project)
    write(ready, wanted)
    delete(os.path.join(options.venv, UNFINISHED))
    print(f"The environment in {options.venv} is ready.")


def prepare(venv, python):
    """Leave an environment with a working pip in ``venv``, marked as unfinished."""
    unfinished = os.path.join(venv, UNFINISHED)
    if os.path.exists(unfinished):
        with open(unfinished) as stream:
            lock(stream)
            if not os.path.exists(os.path.join(venv, OURS)):
                stop(
                    f"an installation into {venv} was interrupted, and what is in there can't be trusted. It "
                    "was not made by the course, so it is left alone: delete it with `make clean-env`, make "
                    "it again as you did before, and run the command again."
                )
            print(f"{venv} is left over from an installation that was interrupted: making it anew.")
            shutil.rmtree(venv)
    if os.path.isdir(venv) and os.listdir(venv):
        if not has_pip(python):
            stop(
                f"{venv} is there, but it has no Python with a working pip (was the Python it was made from "
                "removed?). Delete it with `make clean-env` and run the command again."
            )
        mark_unfinished(unfinished)
        return
    if importlib.util.find_spec("ensurepip") is None:
        stop(
            f"{sys.executable} can't make virtual environments because its module `ensurepip` is missing. "
            "On Debian and Ubuntu: apt install python3-venv"
        )
    os.makedirs(venv, exist_ok=True)
    mark_unfinished(unfinished)
    write(os.path.join(venv, OURS), "")
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"Making a virtual environment in {venv} with Python {version}.", flush=True)
    if run([sys.executable, "-m", "venv", venv]):
        stop(f"Python could not make a virtual environment in {venv}: see above.")


def install(venv, python, project):
    print("Installing the course. The first time this downloads a few GB, mostly PyTorch.", flush=True)
    pip = [python, "-m", "pip", "install"]
    # pip before 21.3, which Python 3.10.0 brings, can't install a project of this form.
    code = run([*pip, "--quiet", "pip>=21.3"]) or run([*pip, "-e", project + "[test]"])
    if code:
        if code > 0:  # pip ended by itself and tidied up; a signal (code < 0) may have hit it half-way
            delete(os.path.join(venv, UNFINISHED))
        stop(
            "pip could not install the course: see above. Without a network connection, or with the disk "
            "full, put that right and run the same command again; finished downloads are not repeated."
        )


def install_crf(venv, python, project):
    """pydensecrf is compiled here, and a machine without a C++ compiler still gets the rest of the course."""
    print("Building the optional CRF package (about a minute).", flush=True)
    pip = [python, "-m", "pip", "install"]
    log = os.path.join(venv, CRF_LOG)
    with open(log, "w") as stream:
        streams = {"stdout": stream, "stderr": subprocess.STDOUT}
        # The package asks to be built with a Cython whose code Python 3.13 and later can't compile. Built
        # with a current one, it works from 3.10 on.
        code = run([*pip, "cython>=3", "setuptools>=77", "wheel"], **streams)
        code = code or run([*pip, "--no-build-isolation", "-e", project + "[test,crf]"], **streams)
    if code < 0:
        stop("Building the CRF package was interrupted. Run the command again.")
    if code:
        print(
            "NOTE: the CRF package (pydensecrf2) could not be built, so Table 4's CRF columns stay empty; "
            "all the rest works. It needs a C++ compiler and Python's headers (Debian, Ubuntu: "
            "apt install g++ python3-dev; macOS: xcode-select --install); `make crf` then adds it. "
            f"What went wrong is in {log}.",
            flush=True,
        )


def remove(venv):
    if not os.path.isdir(venv):
        return
    if not any(os.path.exists(os.path.join(venv, name)) for name in ("pyvenv.cfg", UNFINISHED)):
        stop(f"{venv} doesn't look like a virtual environment (it has no pyvenv.cfg); it is left alone.")
    shutil.rmtree(venv)
    print(f"Deleted {venv}.")


def has_pip(python):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return os.path.exists(python) and run([python, "-m", "pip", "--version"], **quiet) == 0


def run(command, **streams):
    # close_fds=False hands the lock down: it is held for as long as pip runs, even if this process is killed.
    return subprocess.call(command, close_fds=False, **streams)


def mark_unfinished(path):
    stream = open(path, "w")
    lock(stream)
    HELD.append(stream)


def lock(stream):
    if fcntl is None:
        stream.close()  # Windows can't delete a file that is open
        return
    os.set_inheritable(stream.fileno(), True)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop(
            "another process is installing into this environment right now. Wait for it to end, then run "
            "the command again."
        )


def interpreter(venv):
    return os.path.join(venv, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def fingerprint(project):
    path = os.path.join(project, "pyproject.toml")
    if not os.path.exists(path):
        stop(f"There is no {path}: run this from the course's folder.")
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def read(path):
    if not os.path.exists(path):
        return None
    with open(path) as stream:
        return stream.read()


def write(path, text):
    with open(path + ".new", "w") as stream:
        stream.write(text)
    os.replace(path + ".new", path)


def delete(path):
    if os.path.exists(path):
        os.remove(path)


def stop(message):
    sys.exit("make_env: " + message)


if __name__ == "__main__":
    main()
