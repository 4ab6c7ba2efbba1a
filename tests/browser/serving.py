"""JupyterLab and Voilà on loopback with nothing of the user's, and the system's Chromium to look at them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOLDERS = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
}
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}


def missing():
    """What has to be installed before a browser can be driven, as a sentence; empty if nothing."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed: pip install playwright (its own browsers are not needed)."
    if browser_path() is None:
        return "There is no Chromium: install one (Debian: apt install chromium) so that it is on the PATH."
    return ""


def browser_path():
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def chromium(*arguments):
    """A headless Chromium, as a Playwright browser."""
    from playwright.sync_api import sync_playwright

    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments += ("--no-sandbox",)  # Chromium refuses to run as root with it
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(arguments))
        yield browser
        browser.close()


def environment(folder, store, budget):
    """Environment of a server whose settings, kernels' files and workspaces all lie in ``folder``."""
    own = {name: str(folder / place) for name, place in FOLDERS.items()}
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    course = {"DRS_STORE": str(store), "DRS_BUDGET": budget, "PYTHONPATH": path}
    # As in `make lab` and `make lab-page`: an upload larger than a message may be by default, 10 MiB, is lost
    # without a word, and so is every later one.
    course["JUPYTER_CONFIG_PATH"] = str(ROOT / "tools" / "jupyter")
    return {**os.environ, **own, **course}


class Server:
    """A server in a process of its own. ``url`` ends with a slash; ``token`` opens it."""

    def __init__(self, folder, process, url, token=""):
        self.folder, self.process, self.url, self.token = folder, process, url, token

    def ask(self, method, path):
        """A call of Jupyter's REST API; what it answers, from JSON."""
        request = urllib.request.Request(
            self.url + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or "null")

    def kernel_file(self, kernel_id="*"):
        (found,) = self.folder.rglob(f"kernel-{kernel_id}.json")
        return found


@contextmanager
def jupyterlab(folder, pages, store, budget="ci"):
    """JupyterLab over the folder ``pages``, with all it keeps in ``folder``. A `Server`."""
    token, port = os.urandom(16).hex(), _free_port()
    options = (
        "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={pages}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None",
        "--LabApp.extension_manager=readonly",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "jupyterlab", *options]
    with _serving(folder, command, environment(folder, store, budget)) as process:
        server = Server(folder, process, url, token)
        _wait_for(lambda: server.ask("GET", "api/status"), process, folder / "log")
        yield server


@contextmanager
def voila(folder, notebook, store, budget="ci"):
    """Voilà's page of one notebook. A `Server`, whose page is at its ``url``."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [
        sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}",
        "--Voila.port_retries=0", f"--Voila.connection_dir_root={folder}",
    ]  # fmt: skip
    with _serving(folder, command, environment(folder, store, budget)) as process:
        server = Server(folder, process, url)
        _wait_for(lambda: _listens(port), process, folder / "log")
        yield server


@contextmanager
def _serving(folder, command, env):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()  # the server ends its kernels
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(answers, process, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            answers()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise RuntimeError(f"The server didn't start:\n{log.read_text(errors='replace')[-3000:]}")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port):
    socket.create_connection(("127.0.0.1", port), 1).close()
