"""A headless Chromium, spoken to through its debugging pipe: nothing but the standard library."""

import json
import os
import select
import shutil
import subprocess
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `events` has what the page reported: requests, exceptions."""

    def __init__(self, path: str, profile, seconds: float = 120) -> None:
        here, theirs = os.pipe(), os.pipe()  # we write to it, it writes to us
        flags = (
            '--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio'
        )
        words = f'exec "$0" {flags} --remote-debugging-pipe "$@" 3<&{here[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ['bash', '-c', words, path, f'--user-data-dir={profile}', '--window-size=1200,900'],
            pass_fds=(here[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(here[0])
        os.close(theirs[1])
        self.write, self.read = here[1], theirs[0]
        self.number, self.session, self.events, self.rest = 0, None, [], b''
        self.deadline = time.monotonic() + seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)

    def call(self, method: str, **params):
        """A command of the protocol and its result."""
        answer = self.ask(method, **params)
        assert 'error' not in answer, answer
        return answer['result']

    def ask(self, method: str, **params) -> dict:
        """A command of the protocol and its answer, which may be an error."""
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        message |= {'sessionId': self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self.number:
                return answer
            self.events.append(answer)

    def _next(self) -> dict:
        while b'\0' not in self.rest:
            left = self.deadline - time.monotonic()
            ready = select.select([self.read], [], [], max(left, 0))[0]
            if not ready or not (more := os.read(self.read, 1 << 20)):
                raise TimeoutError('the browser does not answer')
            self.rest += more
        message, _, self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def open(self, url: str) -> None:
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network'):
            self.call(f'{domain}.enable')
        self.call('Page.navigate', url=url)
        while self.js('document.readyState') != 'complete' or self.js('location.href') != url:
            time.sleep(0.05)

    def js(self, code: str):
        for _ in range(40):  # while a page comes or goes, what is asked for may not be there yet
            answer = self.ask('Runtime.evaluate', expression=code, returnByValue=True)
            if 'error' not in answer and 'exceptionDetails' not in answer['result']:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(answer)
        return answer['result']['result'].get('value')

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        self.call(
            'Input.dispatchMouseEvent', type=kind, x=x, y=y, clickCount=int(kind != 'mouseMoved'),
            button='none' if kind == 'mouseMoved' and not held else 'left', buttons=int(held),
        )  # fmt: skip

    def key(self, name: str, shift: bool = False) -> None:
        code = {'Tab': 9, 'Enter': 13, 'Escape': 27, 'ArrowRight': 39, 'ArrowDown': 40}[name]
        for kind in ('rawKeyDown', 'keyUp'):
            self.call(
                'Input.dispatchKeyEvent', type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                modifiers=8 * shift,
            )  # fmt: skip
