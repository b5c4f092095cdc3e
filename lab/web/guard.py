"""Middleware that checks each request's token and host name, and sets the security headers of each response."""

import hashlib
import hmac
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

COOKIE = "autoresearch"
OPEN = ("/health", "/static/style.css")  # no token needed
LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
# plotly sets style attributes and adds two style elements: an empty one, which it fills rule by rule, and one for its
# maps. These are their hashes. Another version of plotly may have a different second one; it is then blocked, which does
# not matter because no chart here has a map.
STYLES = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self'; style-src-elem 'self' {STYLES}; "
    "style-src-attr 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware. token: None lets everybody in. local_only: answers only requests whose Host is loopback, so that
    no other site can read the dashboard through a domain name of its own that resolves to this machine."""

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
        """The response that refuses the request; None lets it through."""
        headers = Headers(scope=scope)
        if self.local_only and not LOCAL.fullmatch(headers.get("host", "")):
            return JSONResponse({"detail": "this dashboard only answers requests to localhost and 127.0.0.1"}, 400)
        if self.token is None or scope["path"] in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if (scheme.lower() == "bearer" and self.admits(given.strip())) or self.has_cookie(headers):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown, others = [v for k, v in query if k == "token"], [(k, v) for k, v in query if k != "token"]
        if shown and self.admits(shown[-1]) and scope["method"] == "GET":
            rest = urlencode(others)
            answer = RedirectResponse("/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, self.cookie(), httponly=True, samesite="strict", max_age=7 * 24 * 3600)
            return answer
        wrong = bool(shown) or "authorization" in headers
        if "text/html" in headers.get("accept", ""):
            return HTMLResponse(self.login_page(wrong, others), 401)
        detail = "this is not the token" if wrong else "a token is needed: Authorization: Bearer TOKEN"
        return JSONResponse({"detail": detail}, 401, {"www-authenticate": "Bearer"})

    def admits(self, shown):
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self.token.encode())

    def cookie(self):
        """The cookie's value, derived from the token so that the browser does not store the token itself."""
        return hmac.new(self.token.encode(), b"cookie", hashlib.sha256).hexdigest()

    def has_cookie(self, headers):
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        shown = cookies[COOKIE].value if COOKIE in cookies else ""
        return hmac.compare_digest(shown.encode(), self.cookie().encode())
