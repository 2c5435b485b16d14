"""Firefox and WebKitGTK for the tests of the page, with the standard library alone.

Both engines speak WebDriver (https://www.w3.org/TR/webdriver2/): WebKit through its own
driver program over HTTP, Firefox through Marionette, the protocol below geckodriver,
which Debian does not package. `Firefox` and `WebKit` are the two transports; a `Page` is
one of their tabs, with those methods of Playwright's `Page` that the tests use, so that
one test runs in Chromium, Firefox and WebKit.

    browser = Firefox()
    page = Page(browser)
    page.goto("http://127.0.0.1:8000/")
    page.click("#open-share")
    browser.close()
"""

import base64
import contextlib
import glob
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

START_SECONDS = 180                  # that only a failure reaches
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # how WebDriver marks an element
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Shift": "\ue008",
        "Control": "\ue009", "Alt": "\ue00a", "Backspace": "\ue003", "Delete": "\ue017",
        "PageUp": "\ue00e", "PageDown": "\ue00f", "End": "\ue010", "Home": "\ue011",
        "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014",
        "ArrowDown": "\ue015"}


class WebDriverError(Exception):
    """The browser refused a command, or could not be started."""


class Missing(WebDriverError):
    """A program is not installed. The message says how to get it."""


def program(name, package):
    found = shutil.which(name)
    if not found:
        raise Missing("%s: apt install %s" % (name, package))
    return found


def wait_for(fact, process):
    """Wait until fact() is true and return it, or say that the process has failed."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        value = fact()
        if value:
            return value
        time.sleep(0.02)
    raise WebDriverError("%s did not start" % process.args[0])


def end(process):
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


class Firefox:
    """Headless Firefox with its own profile. Marionette: JSON arrays over TCP, each
    with its length before it; [0, id, command, parameters] and [1, id, error, result]."""

    PREFERENCES = {"marionette.port": 0, "app.update.enabled": False,
                   "app.normandy.enabled": False, "browser.shell.checkDefaultBrowser": False}

    def __init__(self):
        firefox = os.environ.get("NEUROENGINE_FIREFOX") or program("firefox-esr", "firefox-esr")
        self.profile, self.commands = tempfile.mkdtemp(), 0
        with open(os.path.join(self.profile, "user.js"), "w") as file:
            for item in self.PREFERENCES.items():
                file.write("user_pref(%s, %s);\n" % tuple(map(json.dumps, item)))
        self.process = subprocess.Popen(
            [firefox, "--headless", "--no-remote", "--marionette", "--profile", self.profile],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = wait_for(self._port, self.process)
            self.socket = socket.create_connection(("127.0.0.1", port), START_SECONDS)
            self.file = self.socket.makefile("rb")
            self._receive()                                  # it says hello first
            self.command("NewSession")
        except BaseException:
            self.close()
            raise

    def _port(self):
        with contextlib.suppress(OSError, ValueError), \
                open(os.path.join(self.profile, "MarionetteActivePort")) as file:
            return int(file.read())

    def _receive(self):
        length = b""
        while not length.endswith(b":"):
            byte = self.file.read(1)
            if not byte:
                raise WebDriverError("Firefox is gone")
            length += byte
        return json.loads(self.file.read(int(length[:-1])))

    def command(self, name, **parameters):
        self.commands += 1
        message = json.dumps([0, self.commands, "WebDriver:" + name, parameters]).encode()
        self.socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._receive()
        if error:
            raise WebDriverError("%s: %s" % (error["error"], error["message"]))
        # Only results that are no objects are wrapped in one.
        return result["value"] if isinstance(result, dict) and "value" in result else result

    def close(self):
        end(self.process)
        shutil.rmtree(self.profile, ignore_errors=True)


class WebKit:
    """WebKitGTK's small browser in an X server without a screen, by WebKit's driver."""

    COMMANDS = {                                             # name: (method, path)
        "NewSession": ("POST", ""), "DeleteSession": ("DELETE", ""),
        "Navigate": ("POST", "/url"), "GetCurrentURL": ("GET", "/url"),
        "Refresh": ("POST", "/refresh"), "Back": ("POST", "/back"),
        "NewWindow": ("POST", "/window/new"), "SwitchToWindow": ("POST", "/window"),
        "CloseWindow": ("DELETE", "/window"),
        "ExecuteScript": ("POST", "/execute/sync"),
        "ElementClick": ("POST", "/element/{id}/click"),
        "ElementSendKeys": ("POST", "/element/{id}/value"),
        "PerformActions": ("POST", "/actions"), "ReleaseActions": ("DELETE", "/actions"),
        "TakeScreenshot": ("GET", "/screenshot"),
    }
    BROWSERS = "/usr/lib/*/webkit2gtk-4.*/MiniBrowser"

    def __init__(self):
        driver = program("WebKitWebDriver", "webkit2gtk-driver")
        browser = os.environ.get("NEUROENGINE_WEBKIT") or max(glob.glob(self.BROWSERS), default="")
        if not browser:
            raise Missing("MiniBrowser: apt install webkit2gtk-driver")
        self.processes, self.session = [], ""
        try:
            display = self._start_screen()
            with socket.socket() as free:                    # the driver takes no port 0
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            self._start([driver, "--port=%d" % self.port],
                        env=dict(os.environ, DISPLAY=display, GDK_BACKEND="x11"))
            wait_for(self._listens, self.processes[-1])
            self.session = "/" + self.command("NewSession", capabilities={"alwaysMatch": {
                "webkitgtk:browserOptions": {"binary": browser, "args": ["--automation"]}
            }})["sessionId"]
        except BaseException:
            self.close()
            raise

    def _start(self, command, **more):
        self.processes.append(subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, **more))

    def _start_screen(self):
        """Start an X server, which finds a free display itself. Return its name."""
        reader, writer = os.pipe()
        self._start([program("Xvfb", "xvfb"), "-displayfd", str(writer), "-nolisten", "tcp",
                     "-screen", "0", "1280x1024x24"], pass_fds=[writer])
        os.close(writer)
        with open(reader) as file:
            return ":" + file.readline().strip()

    def _listens(self):
        with contextlib.suppress(OSError), \
                socket.create_connection(("127.0.0.1", self.port), 1):
            return True

    def command(self, name, **parameters):
        method, path = self.COMMANDS[name]
        if "{id}" in path:
            path = path.format(id=parameters.pop("id"))
        if name == "SwitchToWindow":
            parameters = {"handle": parameters["handle"]}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, "/session" + self.session + path,
                               json.dumps(parameters) if method == "POST" else None)
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise WebDriverError("%s: %s" % (value["error"], value["message"]))
        return value

    def close(self):
        if self.session:
            with contextlib.suppress(WebDriverError, OSError):
                self.command("DeleteSession")                # ends the browser
        for process in reversed(self.processes):
            end(process)


# What Playwright's selectors have beyond CSS, as far as the tests use it: "a >> b" is b
# within a, "text=Send" the innermost element with that text, and at the end of a
# selector stand :visible, :text('Send') (innermost again), and :has-text('Send').
FIND = r"""
const words = (text) => text.replace(/\s+/g, " ").trim().toLowerCase();
const shown = (el) => el.getClientRects().length
    && el.checkVisibility({visibilityProperty: true});
const has = (el, text) => words(el.textContent).includes(words(text));
const find = (selector) => selector.split(" >> ").reduce((scopes, part) => {
    const filters = [];
    const css = part.replace(/^text=(.*)/, "*:text('$1')")
        .replace(/:(visible|(has-)?text\('(.*?)'\))$/g, (all, _, outer, text) => {
            filters.push(all === ":visible" ? shown : outer ? (el) => has(el, text) : (el) =>
                has(el, text) && ![...el.children].some((child) => has(child, text)));
            return "";
        });
    return scopes.flatMap((scope) => [...scope.querySelectorAll(css)]).filter(
        (el) => !/^(SCRIPT|STYLE|HEAD|TITLE)$/.test(el.tagName) && filters.every((f) => f(el)));
}, [document]);
"""


class Page:
    """A tab, with those methods of Playwright's Page that the tests use."""

    context = None                       # all tabs share one

    def __init__(self, browser):
        self.browser, self.timeout = browser, 30
        self.folders = []                  # of files that were chosen
        self.handle = self.command("NewWindow", type="window")["handle"]
        self.keyboard, self.mouse = Keyboard(self), Mouse(self)

    def command(self, name, **parameters):
        handle = getattr(self, "handle", None)
        if handle and getattr(self.browser, "current", None) != handle:
            self.browser.command("SwitchToWindow", handle=handle)
            self.browser.current = handle
        return self.browser.command(name, **parameters)

    def set_default_timeout(self, milliseconds):
        self.timeout = milliseconds / 1000

    def wait_for_timeout(self, milliseconds):
        time.sleep(milliseconds / 1000)

    def goto(self, url):
        self.command("Navigate", url=url)

    def reload(self):
        self.command("Refresh")

    def go_back(self):
        self.command("Back")

    def close(self):
        self.browser.current = self.command("CloseWindow")[0]    # the next is made from it
        self.browser.command("SwitchToWindow", handle=self.browser.current)

    @property
    def url(self):
        return self.evaluate("location.href")

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.command("TakeScreenshot")))

    def evaluate(self, script, arg=None):
        """The value of an expression, or of the function that it is called with arg."""
        return self.command("ExecuteScript", args=[arg], script=(
            "const value = (%s\n);"
            "return typeof value === 'function' ? value(arguments[0]) : value;" % script))

    def _first(self, selector, state="visible"):
        """The first element that fits, or None."""
        found = self.command("ExecuteScript", args=[selector, state == "visible"], script=(
            FIND + "return find(arguments[0]).find((el) => !arguments[1] || shown(el))"))
        return found and found[ELEMENT]

    def _until(self, attempt, what):
        """Repeat until attempt() returns something, because the page keeps changing."""
        deadline = time.monotonic() + self.timeout
        while True:
            error = "it is not there"
            try:
                value = attempt()
                if value is not None:
                    return value
            except WebDriverError as e:
                error = e
            if time.monotonic() > deadline:
                raise AssertionError("%s: %s" % (what, error))
            time.sleep(0.02)

    def wait_for_selector(self, selector, state="visible"):
        self._until(lambda: self._first(selector, state), selector)

    def is_visible(self, selector):
        return self._first(selector) is not None

    def _with(self, selector, body, *args, state="attached"):
        """What a function body returns for the element el and its further arguments."""
        def attempt():
            taken = [selector, state == "visible", *args]
            return self.command("ExecuteScript", args=taken, script=(
                FIND + "const [selector, visible, ...args] = arguments;"
                "const el = find(selector).find((el) => !visible || shown(el));"
                "if (!el) return null; %s" % body))
        return self._until(attempt, selector)

    def query_selector_all(self, selector):
        return self.command("ExecuteScript", args=[selector],
                            script=FIND + "return find(arguments[0])")

    def query_selector(self, selector):
        return self._first(selector, "attached")

    def eval_on_selector_all(self, selector, script):
        return self.command("ExecuteScript", args=[selector],
                            script=FIND + "return (%s)(find(arguments[0]))" % script)

    def eval_on_selector(self, selector, script):
        return self._with(selector, "return (%s)(el)" % script)

    def inner_text(self, selector):
        return self._with(selector, "return el.innerText")

    def inner_html(self, selector):
        return self._with(selector, "return el.innerHTML")

    def text_content(self, selector):
        return self._with(selector, "return el.textContent")

    def input_value(self, selector):
        return self._with(selector, "return el.value")

    def get_attribute(self, selector, name):
        return self._with(selector, "return el.getAttribute(args[0])", name)

    def focus(self, selector):
        self._with(selector, "el.focus(); return true")

    def fill(self, selector, text):
        self._with(selector, "el.focus(); el.value = args[0];"
                   "el.dispatchEvent(new Event('input', {bubbles: true})); return true",
                   text, state="visible")

    def select_option(self, selector, value):
        self._with(selector, "el.value = args[0];"
                   "el.dispatchEvent(new Event('change', {bubbles: true})); return true", value)

    def check(self, selector):
        if not self._with(selector, "return [el.checked]")[0]:
            self.click(selector)

    def uncheck(self, selector):
        if self._with(selector, "return [el.checked]")[0]:
            self.click(selector)

    def press(self, selector, key):
        self.focus(selector)
        self.keyboard.press(key)

    def _act(self, selector, action, state="visible"):
        def attempt():
            element = self._first(selector, state)
            if element is not None:
                action(element)
                return True
        self._until(attempt, selector)

    def click(self, selector):
        self._act(selector, lambda element: self.command("ElementClick", id=element))

    def dblclick(self, selector):
        self._with(selector, "el.scrollIntoView({block: 'center'}); return true", state="visible")
        self._act(selector, self.mouse.double_click)

    def hover(self, selector):
        self._act(selector, self.mouse.move_to)

    def set_input_files(self, selector, file):
        """Choose a file: its path, or a dict with its "name" and bytes ("buffer")."""
        path = file
        if isinstance(file, dict):
            # Kept until the test ends: a browser may read it long after it was chosen.
            self.folders.append(tempfile.TemporaryDirectory())
            path = os.path.join(self.folders[-1].name, file["name"])
            with open(path, "wb") as copy:
                copy.write(file["buffer"])
        self._act(selector, lambda element: self.command(
            "ElementSendKeys", id=element, text=str(path)), "attached")

    def actions(self, kind, *steps, **more):
        self.command("PerformActions", actions=[
            dict(more, type=kind, id=kind, actions=list(steps))])


class Keyboard:
    def __init__(self, page):
        self.page = page

    def press(self, keys):
        """One key, perhaps with others held, as "Shift+Enter"."""
        keys = [KEYS.get(key, key) for key in keys.split("+")]
        self.page.actions("key", *[{"type": "keyDown", "value": key} for key in keys],
                          *[{"type": "keyUp", "value": key} for key in reversed(keys)])

    def type(self, text):
        for character in text:
            self.press(character)


class Mouse:
    def __init__(self, page):
        self.page, self.place = page, {"x": 0, "y": 0, "duration": 0, "origin": "viewport"}

    def move(self, x, y, origin="viewport"):
        self.place = {"x": int(x), "y": int(y), "duration": 0, "origin": origin}
        self.page.actions("pointer", dict(self.place, type="pointerMove"),
                          parameters={"pointerType": "mouse"})

    def move_to(self, element):
        """Move to the middle of an element."""
        self.move(0, 0, {ELEMENT: element})

    def double_click(self, element):
        """Click twice in the middle of an element."""
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self.place = {"x": 0, "y": 0, "duration": 0, "origin": {ELEMENT: element}}
        self.page.actions("pointer", dict(self.place, type="pointerMove"), *press, *press,
                          parameters={"pointerType": "mouse"})

    def wheel(self, across, down):
        """Turn the wheel where the pointer is. WebKit's driver turns it by what differs from the
        turn before, which has to be forgotten."""
        self.page.actions("wheel", dict(self.place, type="scroll", deltaX=across, deltaY=down))
        self.page.command("ReleaseActions")
