"""What stands in front of every request: the token, the host's name, the methods, and the headers of every answer."""

import hashlib
import hmac
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

COOKIE = "autoresearch"
OPEN = ("/health", "/static/style.css")  # without a token
LOCAL = ("localhost", "127.0.0.1", "[::1]")
# plotly writes style elements, which only 'unsafe-inline' lets it; scripts come from this server alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware. token: None lets everybody in. local_only: only requests that name this machine as loopback
    are answered, so that no page of another site can read the dashboard under a name that it points here."""

    def __init__(self, app, token, local_only, login_page):
        self.app, self.token, self.local_only, self.login_page = app, token, local_only, login_page

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        bodiless = scope["method"] == "HEAD"
        if bodiless:
            scope = scope | {"method": "GET"}

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            elif bodiless and message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def refusal(self, scope):
        """The response that ends the request here; None lets it through."""
        headers = Headers(scope=scope)
        if self.local_only and re.sub(r":\d+$", "", headers.get("host", "")) not in LOCAL:
            return JSONResponse({"detail": "this dashboard answers to localhost and 127.0.0.1 only"}, 400)
        if self.token is None or scope["path"] in OPEN:
            return None
        if self.admits(headers.get("authorization", "").removeprefix("Bearer ")) or self.has_cookie(headers):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = [value for key, value in query if key == "token"]
        if shown and self.admits(shown[-1]) and scope["method"] == "GET":
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            answer = RedirectResponse("/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, self.cookie(), httponly=True, samesite="strict", max_age=7 * 24 * 3600)
            return answer
        wrong = bool(shown) or "authorization" in headers
        if "text/html" in headers.get("accept", ""):
            return HTMLResponse(self.login_page(wrong), 401)
        said = "this is not the token" if wrong else "a token is needed: Authorization: Bearer TOKEN"
        return JSONResponse({"detail": said}, 401, {"www-authenticate": "Bearer"})

    def admits(self, shown):
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self.token.encode())

    def cookie(self):
        """Made from the token, which itself is not left lying in a browser."""
        return hmac.new(self.token.encode(), b"cookie", hashlib.sha256).hexdigest()

    def has_cookie(self, headers):
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        shown = cookies[COOKIE].value if COOKIE in cookies else ""
        return hmac.compare_digest(shown.encode(), self.cookie().encode())
