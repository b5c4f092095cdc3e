"""The application: pages and API for {name: Tree}. No request writes, and no part of a URL becomes a path."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.exceptions import HTTPException as StarletteException

from lab.analysis import curves
from lab.base.errors import Stop
from lab.charts import plotly_charts
from lab.share.team import found_by
from lab.web import content, models, team_page
from lab.web.guard import Guard

HERE = Path(__file__).parent
Commit = Annotated[str, InPath(pattern="^[0-9a-f]{4,40}$", max_length=40, description="hex, 4 to 40 digits")]
TreeName = Annotated[str | None, Query(max_length=300, description="name of a working tree (default: the first)")]
MISSING = {404: {"model": models.Problem, "description": "no such tree or experiment"}}


def create(trees, token=None, local_only=True):
    """The ASGI application. trees: {name: Tree}, at least one."""
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape(default=True))
    pages.globals["trees"] = list(trees)
    static = {name: HERE / "static" / name for name in ("style.css", "app.js", "chart.js", "experiment.js")}
    (package,) = importlib.util.find_spec("plotly").submodule_search_locations
    static["plotly.min.js"] = Path(package) / "package_data" / "plotly.min.js"
    app = FastAPI(title="autoresearch", redirect_slashes=False, docs_url=None, redoc_url=None, version="1",
                  description="A night's experiments, read-only. Lower val_bpb is better.")  # fmt: skip

    def page(name, code=200, headers=None, /, **values):
        return HTMLResponse(pages.get_template(name).render(**values), code, headers)

    def tree_of(name):
        if name is None:
            return next(iter(trees.values()))
        if name not in trees:
            raise HTTPException(404, "there is no such working tree here")
        return trees[name]

    def night_of(name):
        tree = tree_of(name)
        return tree, *tree.night()

    def experiment_of(name, commit):
        tree, night, _ = night_of(name)
        experiment = content.lookup(night, commit)
        if experiment is None:
            raise HTTPException(404, "no experiment of this tree, or more than one, has this commit")
        return tree, night, experiment

    def detail(tree, night, experiment):
        gains = {e.number: gain for e, gain in night.gains()}
        diff, diff_of = content.diff(tree, night, experiment)
        log, log_of = content.log_tail(tree, experiment)
        facts = [content.run_facts(record) for record in experiment.runs]
        return content.brief(experiment, gains, night.best) | {
            "tree": tree.name, "run_facts": facts, "diff": diff, "diff_of": diff_of, "log": log, "log_of": log_of,
        }  # fmt: skip

    def comparing(tree, night, experiment):
        """The Night with the best and the parent that the experiment's curve is shown over: the team's, if it is in that."""
        try:
            team, _ = tree.team()
        except (Stop, OSError, ValueError):
            return night
        own = {r["commit"] for r in experiment.runs}
        return team.night if team and any(r["commit"] in own for r in team.night.records) else night

    def whole(tree, night, problem):
        briefs = content.all_briefs(night)
        by_number = {b["number"]: b for b in briefs}
        return {
            "tree": tree.name, "problem": problem, "notes": list(night.notes), "sigma": night.sigma,
            "runs_per_hour": night.runs_per_hour, "counts": Counter(b["status"] for b in briefs), "experiments": briefs,
            "best": night.best and by_number[night.best.number], "best_by_estimate": night.by_estimate,
            "baseline": night.baseline and by_number[night.baseline.number],
        }  # fmt: skip

    def team_of(name):
        tree = tree_of(name)
        try:
            return tree, *team_page.of(tree, trees)
        except (Stop, OSError, ValueError) as error:
            raise HTTPException(404, content.plain(str(error), 300)) from None

    def team_name(tree):
        try:
            return tree.team_name()
        except Stop:
            return None

    def live_of(tree):
        night, _ = tree.night()
        return {"tree": tree.name, "version": tree.version, "experiments": len(night.experiments)} | tree.live()

    @app.get("/", include_in_schema=False)
    def night_page(tree: TreeName = None):
        live = live_of(tree_of(tree))  # first: a record in between must leave an old version, with which the page reloads
        return page("night.html", **whole(*night_of(tree)), live=live, team=team_name(tree_of(tree)))

    @app.get("/team", include_in_schema=False)
    def team_as_page(tree: TreeName = None):
        return page("team.html", **team_page.whole(*team_of(tree)))

    @app.get("/experiment/{commit}", include_in_schema=False)
    def experiment_page(commit: Commit, tree: TreeName = None):
        found = experiment_of(tree, commit)
        text, reason = content.sample(found[2])
        values = detail(*found)
        columns = dict.fromkeys(key for facts in values["run_facts"] for key in facts)
        shown = found[2]
        has_curve = bool(curves.of(shown))
        told = curves.sentences(comparing(*found), shown) if has_curve else ()
        return page(
            "experiment.html", **values, columns=columns, sample=text, sample_reason=reason, told=told, has_curve=has_curve,
        )  # fmt: skip

    @app.get("/docs", include_in_schema=False)
    def docs_page():
        return page("docs.html", paths=app.openapi()["paths"], tree=next(iter(trees)))

    @app.get("/static/{name}", include_in_schema=False)
    def static_file(name: str):
        if name not in static:
            raise HTTPException(404, "no such file")
        caching = "public, max-age=86400" if name.startswith("plotly") else "no-cache"  # plotly has 5 MB
        return FileResponse(static[name], headers={"cache-control": caching})

    @app.get("/api/experiments", responses=MISSING)
    def experiments(tree: TreeName = None) -> models.Night:
        """The whole night of a tree: every experiment in order, best, baseline, noise, counts."""
        return whole(*night_of(tree))

    @app.get("/api/experiments/{commit}", responses=MISSING)
    def experiment(commit: Commit, tree: TreeName = None) -> models.Detail:
        """One experiment: its runs, the diff against its parent, the end of its log."""
        return detail(*experiment_of(tree, commit))

    @app.get("/api/curves/{commit}", responses=MISSING)
    def loss_curves(commit: Commit, tree: TreeName = None) -> dict:
        """The experiment's training loss over its parent's and the best's (in a team, the team's), as plotly's data and
        layout."""
        found = experiment_of(tree, commit)
        return plotly_charts.loss_curves(comparing(*found), found[2])

    @app.get("/api/samples/{commit}", responses=MISSING)
    def sample(commit: Commit, tree: TreeName = None) -> models.Sample:
        """The text that a kept experiment's model wrote."""
        found = experiment_of(tree, commit)[2]
        text, reason = content.sample(found)
        return {"commit": found.commit, "text": text, "reason": reason}

    @app.get("/api/latest", responses=MISSING)
    def latest(tree: TreeName = None) -> models.Latest:
        """The last experiment, the best so far, and the run in progress."""
        it, night, problem = night_of(tree)
        known = whole(it, night, problem)
        last = known["experiments"][-1] if known["experiments"] else None
        return {"tree": it.name, "experiment": last, "best": known["best"], "live": live_of(it)}

    @app.get("/api/live", responses=MISSING)
    def live(tree: TreeName = None) -> models.Live:
        """The run in progress: step, loss, tokens/s, seconds left."""
        return live_of(tree_of(tree))

    @app.get("/api/chart", responses=MISSING)
    def chart(tree: TreeName = None) -> dict:
        """The progress chart as plotly's data and layout."""
        return plotly_charts.progress(night_of(tree)[1])

    @app.get("/api/team", responses=MISSING)
    def team(tree: TreeName = None) -> models.Team:
        """The team that a tree is in, as one night: its trees, what each found, every experiment, one best."""
        return team_page.whole(*team_of(tree))

    @app.get("/api/team/live", responses=MISSING)
    def team_live(tree: TreeName = None) -> models.TeamLive:
        """What each tree of the team runs right now."""
        it, team, version, shown = team_of(tree)
        return {"tree": it.name, "version": version, "members": team_page.now(team, shown)}

    @app.get("/api/team/chart", responses=MISSING)
    def team_chart(tree: TreeName = None) -> dict:
        """The team's progress chart, a colour a tree, as plotly's data and layout."""
        _, team, _, shown = team_of(tree)
        pages = {name: its.name for name, its in shown.items()}
        return plotly_charts.team(team.night, found_by(team.night), pages)

    @app.get("/health")
    def health() -> models.Health:
        """Whether the dashboard answers."""
        return {"status": "ok"}

    @app.exception_handler(StarletteException)
    def refused(request: Request, error):
        if "text/html" in request.headers.get("accept", ""):
            values = {"title": str(error.status_code), "text": str(error.detail)}
            return page("message.html", error.status_code, error.headers, **values)
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error):
        if "text/html" in request.headers.get("accept", ""):
            return page("message.html", 422, title="422", text="A commit is 4 to 40 hexadecimal digits.")
        places = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in error.errors()]  # without the rejected input
        return JSONResponse({"detail": jsonable_encoder(places)}, 422)

    def login_page(wrong, query):
        return pages.get_template("login.html").render(wrong=wrong, query=query)

    app.add_middleware(Guard, token=token, local_only=local_only, login_page=login_page)
    return app
