"""What the dashboard shows of a team: its night, which all trees have in common, and what each of them found."""

from collections import Counter

from lab.base.errors import Refused
from lab.charts.plotly_charts import mark
from lab.loop import team_status
from lab.share.team import found_by
from lab.store.repository import Untrusted
from lab.web import content

NAME, TEXT = 80, 300  # characters of a tree's name; of what it says that it does


def of(tree, served):
    """(Team, version, {name of a member's tree: the Tree of `served` that shows it}). tree: one that is in the team. Raises
    Refused if it is in none, and GitError."""
    team, version = tree.team()
    if team is None:
        raise Refused("this working tree is in no team")
    shown, at = {}, {t.path: t for t in served.values()}
    here = {tag: path for tag, (path, _) in team_status.working_trees(Untrusted(tree.path)).items()}
    for member in team.trees:
        if member.is_here and member.tag in here and (its := at.get(here[member.tag].resolve())):
            shown[name_of(team, member)] = its
    return team, version, shown


def name_of(team, member):
    return team.name_of({"member": member.member, "tag": member.tag})


def plain(name):
    return content.plain(name, NAME)


def whole(tree, team, version, shown):
    """The fields of models.Team."""
    night = team.night
    finder, record = found_by(night), {r["row"]: r for r in night.rows}
    experiments = [
        b | {"found_by": plain(finder[b["number"]]), "page": page_of(finder[b["number"]], shown), "late": bool(record[b["number"]].get("late")),
             "label": plain(record[b["number"]]["label"])}
        for b in content.all_briefs(night)
    ]  # fmt: skip
    by_number = {e["number"]: e for e in experiments}
    return {
        "tree": tree.name, "team": team.member.team, "version": version, "notes": [content.plain(note, TEXT) for note in team.notes],
        "sigma": night.sigma, "runs": len(night.records), "runs_per_hour": team_status.runs_an_hour(night.records),
        "counts": Counter(e["status"] for e in experiments), "experiments": experiments, "members": members(team, shown),
        "best": night.best and by_number[night.best.number], "best_by_estimate": night.by_estimate,
        "baseline": night.baseline and by_number[night.baseline.number],
        "ideas": [{"label": plain(r["label"]), "device": content.plain(team_status.device_of(r), 200), "description": r["description"]}
                  for r in team_status.kept_ideas(team)],
    }  # fmt: skip


def page_of(name, shown):
    return shown[name].name if name in shown else None


def members(team, shown):
    """A row for each tree, the one that gained most first."""
    night, finder = team.night, found_by(team.night)
    order, gains = list(dict.fromkeys(finder.values())), Counter()
    comparable = {(r["member"], r["tag"]) for r in night.records}
    for e, gain in night.gains():
        gains[finder[e.number]] += gain
    found = []
    for tree in team.trees:
        name = name_of(team, tree)
        own = [e for e in night.experiments if finder[e.number] == name]
        colour, _, sign = mark(order.index(name)) if name in order else (None, None, "")
        ends = [r["end"] for r in tree.records if r["end"]]
        found.append({
            "name": plain(name), "host": content.plain(tree.state.get("host", ""), NAME), "here": tree.is_here, "page": page_of(name, shown),
            "runs": len(tree.records), "experiments": len(own), "kept": sum(e.kept for e in own), "gain": gains.get(name),
            "best": min((e.val_bpb for e in own if e.kept), default=None), "last": max(ends, default=None),
            "compares": (tree.member, tree.tag) in comparable, "runs_now": runs_now(name, tree, shown),
            "colour": colour, "sign": sign,
        })  # fmt: skip
    return sorted(found, key=lambda m: (-(m["gain"] or 0), -m["experiments"], m["name"]))


def now(team, shown):
    names = [(name_of(team, tree), tree) for tree in team.trees]
    return [{"name": plain(name), "runs_now": runs_now(name, tree, shown)} for name, tree in names]


def runs_now(name, tree, shown):
    """What the tree runs right now, as far as can be seen from here; else what it said last."""
    if name not in shown:
        return content.plain(team_status.what_it_said(tree), TEXT)
    live = shown[name].live()
    if not live["running"]:
        return ""
    return f"{live['stage']}, {live['percent']:.0f} %" if live.get("percent") is not None else live["stage"]
