"""The verdict: what single judgements are, what the rule remembers, and what it is worth over simulated nights."""

import math
import random

import numpy as np
import pytest
import simulate_nights as sim
from simulate_nights import Nights, Rule, Setting, compare, play

from lab.analysis import verdict
from lab.analysis.verdict import (
    bar,
    begin,
    belief,
    doubted,
    earned,
    ended,
    estimate,
    holds,
    judge,
    judge_baseline,
    remeasured,
    stepped_back,
    unproven,
)

BASELINE = (0.999, 1.0, 1.001)  # σ = 0.001
SIGMA = 0.001


def failed(search, times, value=1.002):
    """So many experiments that measured far apart from each other, so that their spread says nothing about σ."""
    for i in range(times):
        search = ended(search, [value + 0.01 * i], keep=False)
    return search


def random_search(rng, scale=1.0, steps=40):
    """A night of random measurements, judged by the rule. Yields every state of it and what came before and after."""
    sigma = 10 ** rng.uniform(-4, -2)
    truth, draw = 1.0, lambda at: scale * rng.gauss(at, sigma)
    search = begin([draw(truth) for _ in range(3)])
    for _ in range(steps):
        before = search
        if doubted(search):
            search = remeasured(search, draw(truth))
            yield before, "tip", None, search
            if not holds(search):
                before, search = search, stepped_back(search)
                yield before, "back", None, search
            continue
        at, values, status = truth + rng.choice([-1, 1, 1]) * rng.expovariate(1 / sigma), [], "confirm"
        while status == "confirm":
            values.append(draw(at))
            status = judge(search, values).status
        search = ended(search, values, status == "keep")
        truth = at if status == "keep" else truth
        yield before, status, values, search


# ---------------------------------------------------------------------------------------------------
# The number to beat


def test_the_first_bar_is_computed_by_hand():
    search = begin(BASELINE)
    assert search.sigma == pytest.approx(SIGMA)
    assert belief(search) == pytest.approx(1.0)  # nobody chose the baseline
    assert bar(search).keep == bar(search).confirm == pytest.approx(1 - verdict.BAR * SIGMA)
    assert bar(search, 2).keep == pytest.approx(1 - verdict.BAR * SIGMA / math.sqrt(2))


def test_a_night_that_gains_nothing_makes_the_bar_stricter_and_runs_again_what_is_between():
    search = failed(begin(BASELINE), 30)._replace(sigma=SIGMA)
    assert unproven(search) == pytest.approx(math.log1p(30 / verdict.PATIENCE))
    found = bar(search)
    assert found.confirm == pytest.approx(1 - verdict.BAR * SIGMA)
    assert found.keep == pytest.approx(1 - (verdict.BAR + verdict.PROOF * math.log1p(30 / verdict.PATIENCE)) * SIGMA)
    between = (found.keep + found.confirm) / 2
    assert judge(search, [found.keep - 1e-9]).status == "keep"
    assert judge(search, [between]).status == "confirm"
    assert judge(search, [found.confirm]).status == "discard"
    assert f"below {found.keep:.6f}" in judge(search, [between]).why
    assert f"run again below {found.confirm:.6f}" in judge(search, [between]).why


def test_a_kept_value_is_believed_less_the_fewer_its_runs():
    kept = ended(begin(BASELINE), [0.99], keep=True)._replace(sigma=SIGMA)
    assert belief(kept) == pytest.approx(0.99 + verdict.BIAS * SIGMA)
    assert belief(kept, back=1) == pytest.approx(1.0)
    assert bar(kept).keep == pytest.approx(0.99 + (verdict.BIAS - verdict.BAR) * SIGMA)
    twice = remeasured(kept, 0.991)._replace(sigma=SIGMA)
    assert belief(twice) == pytest.approx(0.9905 + verdict.BIAS * SIGMA / math.sqrt(2))


def test_what_is_proven_makes_the_rule_as_generous_as_at_first():
    search = failed(begin(BASELINE), 50)
    gained = ended(search, [1 - (verdict.PROVEN + verdict.BIAS) * search.sigma - 1e-9], keep=True)
    gained = gained._replace(sigma=search.sigma)
    assert earned(gained) == pytest.approx(verdict.PROVEN, rel=1e-3)
    assert unproven(gained) == 0 < unproven(search)
    half = ended(search, [1 - (verdict.PROVEN / 2 + verdict.BIAS) * search.sigma], keep=True)._replace(sigma=search.sigma)
    assert unproven(half) == pytest.approx(math.log1p(51 / verdict.PATIENCE) / 2)


def test_an_experiment_is_run_again_a_limited_number_of_times():
    search = failed(begin(BASELINE), 30)._replace(sigma=SIGMA)

    def between(runs):
        return sum(bar(search, runs)) / 2

    assert judge(search, [between(1)]).status == "confirm"
    low = between(2) - 2e-7
    assert judge(search, [low, low + 4e-7]).status == "confirm"
    last = [between(3) - 1e-7, between(3), between(3) + 1e-7]
    assert bar(search, 3).keep == bar(search, 3).confirm
    assert len(last) == verdict.MOST_RUNS and judge(search, last).status != "confirm"
    spent = search._replace(repeats=100)
    assert judge(spent, [between(1)]).status == "discard"
    assert bar(spent).confirm == bar(spent).keep == bar(search).keep


@pytest.mark.parametrize("seed", range(40))
def test_every_verdict_is_the_one_that_the_bar_announced_and_no_discard_makes_the_next_keep_easier(seed):
    seen = set()
    for before, what, values, after in random_search(random.Random(seed), steps=80):
        seen.add(what)
        if what in ("keep", "discard"):
            for n in range(1, len(values) + 1):
                limit, middle = bar(before, n), verdict.mean(values[:n])
                expected = "keep" if middle < limit.keep else "confirm" if middle < limit.confirm else "discard"
                assert judge(before, values[:n]).status == expected
        if what == "discard":
            for n in (1, 2, 3):
                assert bar(after, n).keep <= bar(before, n).keep
            assert belief(after) == belief(before)
    assert {"discard"} <= seen


def test_the_number_to_beat_falls_with_every_failure_but_what_the_tip_is_believed_to_be_worth_stays():
    search, bars = begin(BASELINE), []
    for _ in range(40):
        bars.append(bar(search).keep)
        search = failed(search, 1)
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[-1]


# ---------------------------------------------------------------------------------------------------
# Noise


def test_sigma_is_pooled_over_repeats_and_newer_ones_count_more():
    search = begin(BASELINE)
    fade = 0.5 ** (1 / verdict.HALF_LIFE)
    once = ended(search, [1.1, 1.104], keep=False)  # far from the bar: only its two runs matter
    assert once.sigma == search.sigma  # until the tip is new, or was run again
    squares = 2 * SIGMA**2 * fade + 0.004**2 / 2 / verdict.SELECTED
    assert estimate(once) == pytest.approx(math.sqrt(squares / (2 * fade + 1)))
    tip = remeasured(search, 1.004)  # against the mean of three: (0.004)² · 3/4
    assert tip.sigma == pytest.approx(math.sqrt((2 * SIGMA**2 * fade + 0.004**2 * 3 / 4) / (2 * fade + 1)))
    for _ in range(200):
        once = ended(once, [1.1, 1.1 + 1e-5 * math.sqrt(2 * verdict.SELECTED)], keep=False)
    assert estimate(once._replace(recent=())) == pytest.approx(1e-5, rel=0.05)


def test_results_that_lie_close_together_say_that_sigma_is_small():
    """A night whose baseline was 25 times as noisy as what came later: its repeats alone would hide every gain."""
    rng = random.Random(0)
    search = ended(begin([1.0, 1.02, 0.98]), [0.5], keep=True)
    for _ in range(verdict.RECENT - 1):
        assert estimate(search) > 0.01
        search = ended(search, [0.5 + abs(rng.gauss(0, 0.0008))], keep=False)
    assert 0.0003 < estimate(search) < 0.0016
    assert search.sigma > 0.01, "a discard moved the number to beat"
    assert remeasured(search, 0.5005).sigma < 0.0016


def test_the_spread_of_wide_effects_does_not_raise_sigma():
    assert estimate(failed(begin(BASELINE), verdict.RECENT)) == pytest.approx(SIGMA)


def test_the_spread_of_equal_commits_rarely_lowers_sigma():
    """Of twelve values of one normal distribution the shortest half is often too short: SPREAD makes up for that."""
    rng = np.random.default_rng(1)
    ordered = np.sort(rng.standard_normal((20_000, verdict.RECENT)), 1)
    shortest = (ordered[:, verdict.RECENT // 2 :] - ordered[:, : -verdict.RECENT // 2]).min(1)
    bound = verdict.SPREAD * shortest / verdict.SHORTEST_HALF
    assert np.median(bound) == pytest.approx(1.1, abs=0.15)
    assert np.minimum(1, bound).mean() > 0.85


@pytest.mark.parametrize("setting", [Setting("full", 0.0003), Setting("plateau", 0.002)])
def test_at_the_end_of_a_night_sigma_is_right_or_a_little_large(setting):
    """Although the close calls that are run twice were selected for being close."""
    rule = Rule()
    play(Nights(setting, 100, 500, 5), rule)
    assert 0.85 < np.sqrt((rule.sigma**2).mean()) / setting.sigma < 1.35


def test_the_same_result_under_another_seed_is_one_measurement():
    assert verdict.distinct((1.0, 1.0, 0.9, 1.0)) == (1.0, 0.9)
    same = begin([1.0, 1.0, 1.0])
    assert same.sigma is None and same.runs == 3
    assert begin([1.0, 1.002, 1.002]).sigma == begin([1.0, 1.002]).sigma
    search = begin(BASELINE)
    assert remeasured(search, 1.0).sigma == search.sigma and remeasured(search, 1.0).tip.runs == 3
    assert estimate(ended(search, [1.1, 1.1], keep=False)) == search.sigma
    kept = ended(search, [0.9, 0.9], keep=True)
    assert belief(kept) == pytest.approx(0.9 + verdict.BIAS * kept.sigma)  # one run, not two
    assert judge(search, [0.9988, 0.9988]).status == judge(search, [0.9988]).status


def test_a_machine_on_which_seeds_change_nothing_is_judged_plainly_and_asks_for_no_repeats():
    search = begin([1.0, 1.0, 1.0])
    assert judge(search, [1.0]).status == "discard"
    assert judge(search, [0.999999]).status == "keep" and judge(search, [0.999999]).gain is None
    assert "plain comparison" in judge(search, [0.9]).why
    assert judge(search, [1.0], simpler=True).status == "keep"
    assert judge(search, [1.000001], simpler=True).status == "discard"
    assert not doubted(failed(search, 1000)) and holds(ended(search, [0.9], keep=True))


def test_sigma_is_never_smaller_than_what_val_bpb_is_printed_with():
    assert begin([1.0, 1.0 + 1e-12]).sigma == verdict.RESOLUTION


# ---------------------------------------------------------------------------------------------------
# The tip


def test_the_baseline_runs_three_times_and_is_kept_whatever_it_is_worth():
    assert [judge_baseline([5.0] * n).status for n in (1, 2, 3, 4)] == ["confirm", "confirm", "keep", "keep"]


def test_failures_in_a_row_put_the_tip_in_doubt_sooner_where_nothing_was_earned():
    def failures_until_doubt(search):
        count = 0
        while not doubted(search) and count < 1000:
            search, count = failed(search, 1), count + 1
        return count

    poor = ended(begin(BASELINE), [0.9992], keep=True)
    rich = ended(begin(BASELINE), [0.90], keep=True)
    assert 3 <= failures_until_doubt(poor) <= 6
    assert failures_until_doubt(rich) > 50
    again = remeasured(poor, 0.9993)
    assert failures_until_doubt(again) > 2 * failures_until_doubt(poor)


def test_an_experiment_on_an_older_tip_is_no_failure_of_this_one():
    search = ended(begin(BASELINE), [0.99], keep=True)
    other = ended(search, [1.2], keep=False, on_tip=False)
    assert other.tip.failures == 0 and other.recent == search.recent
    assert (other.experiments, other.runs) == (2, 5)


def test_a_tip_whose_gain_does_not_hold_is_given_up_and_the_keep_before_it_is_the_tip_again():
    search = failed(begin(BASELINE), 3)
    kept = failed(ended(search, [0.9985], keep=True), 15)
    assert doubted(kept)
    good, bad = remeasured(kept, 0.9980), remeasured(kept, 1.001)
    assert holds(good) and not holds(bad)
    back = stepped_back(bad)
    assert back.line == search.line and back.tip.failures == 3
    assert (back.runs, back.repeats, back.experiments) == (bad.runs, bad.repeats, bad.experiments)
    with pytest.raises(ValueError, match="nothing to step back to"):
        stepped_back(search)


def test_the_gain_that_must_hold_is_computed_by_hand():
    kept = ended(begin(BASELINE), [0.9, 0.9002], keep=True)._replace(sigma=SIGMA)

    def with_mean(mean):
        tip = kept.tip._replace(values=(mean - 0.0001, mean + 0.0001))
        return kept._replace(line=(kept.line[0], tip))

    limit = 1 - (verdict.BIAS + verdict.HOLD) * SIGMA / math.sqrt(2)
    assert holds(with_mean(limit - 1e-8)) and not holds(with_mean(limit + 1e-8))


def test_a_doubted_tip_is_run_a_limited_number_of_times():
    search = failed(ended(begin(BASELINE), [0.9985], keep=True), 500)
    runs = 0
    while doubted(search):
        search, runs = remeasured(search, 0.9985), runs + 1  # the same result each time
    assert 0 < runs < verdict.MOST_TIP_RUNS
    assert not doubted(failed(ended(begin(BASELINE), [0.9985], keep=True), 20)._replace(repeats=100))


def test_a_simplification_may_be_half_a_sigma_worse_than_the_best_mean_in_two_runs():
    search = ended(begin(BASELINE), [0.99], keep=True)._replace(sigma=SIGMA)

    def claimed(*worse):
        return judge(search, [0.99 + w * SIGMA for w in worse], simpler=True).status

    assert claimed(0.0) == claimed(1.9) == "confirm"
    assert claimed(2.1) == "discard"
    assert claimed(0.2, 0.7) == "keep"
    assert claimed(0.2, 0.9) == "discard"
    assert claimed(-5.0) == "keep"
    assert bar(search, 2, simpler=True).keep == pytest.approx(0.99 + verdict.SIMPLER * SIGMA)
    assert judge(search, [0.9902, 0.9907]).status == "discard", "not claimed to be simpler"


def test_a_simplification_that_was_kept_need_not_gain_when_it_is_run_again():
    search = ended(begin(BASELINE), [0.99], keep=True)
    kept = ended(search, [0.9901, 0.9902], keep=True, simpler=True)._replace(sigma=SIGMA)
    assert holds(kept) and not holds(kept._replace(line=(*kept.line[:-1], kept.tip._replace(simpler=False))))
    assert not holds(remeasured(kept, 0.995)._replace(sigma=SIGMA))


# ---------------------------------------------------------------------------------------------------
# Properties of the whole rule


def numbers(search, scale=1.0):
    """All that the rule says about a state, val_bpb divided by the scale."""
    bars = [b / scale for n in (1, 2, 3) for simpler in (False, True) for b in bar(search, n, simpler=simpler)]
    return [*bars, belief(search) / scale, search.sigma / scale, earned(search), unproven(search), doubted(search)]


@pytest.mark.parametrize("scale", [10.0, 0.1])
def test_ten_times_the_val_bpb_and_ten_times_the_sigma_are_the_same_night(scale):
    for seed in range(10):
        ours, scaled = random_search(random.Random(seed)), random_search(random.Random(seed), scale)
        for one, other in zip(ours, scaled, strict=True):
            assert one[1] == other[1]
            assert numbers(one[3]) == pytest.approx(numbers(other[3], scale), rel=1e-6)


def test_the_order_of_runs_changes_no_verdict():
    for seed in range(10):
        for before, _, values, _ in random_search(random.Random(seed)):
            if values and len(values) > 1:
                for simpler in (False, True):
                    assert judge(before, values, simpler)[0] == judge(before, values[::-1], simpler)[0]
    assert [begin(order).sigma for order in ([1, 2, 4], [4, 1, 2])] == pytest.approx([begin([2, 4, 1]).sigma] * 2)


def test_lower_is_never_judged_worse():
    order = {"discard": 0, "confirm": 1, "keep": 2}
    for seed in range(10):
        for search, *_ in random_search(random.Random(seed), steps=20):
            values = [belief(search) + z * search.sigma for z in np.linspace(4, -8, 60)]
            for runs in (1, 2):
                judged = [order[judge(search, [v + i * 1e-9 for i in range(runs)]).status] for v in values]
                assert judged == sorted(judged)


def test_more_runs_of_the_same_mean_never_need_a_larger_gain():
    for seed in range(10):
        for _, _, _, search in random_search(random.Random(seed)):
            assert bar(search, 1).keep <= bar(search, 2).keep <= bar(search, 3).keep < belief(search)


def test_nothing_is_ever_nan_and_what_is_not_finite_is_refused():
    for seed in range(30):
        for _, _, _, search in random_search(random.Random(seed), scale=10.0 ** (seed % 7 - 3)):
            assert all(math.isfinite(number) for number in numbers(search))
    search = begin(BASELINE)
    for bad in (math.nan, math.inf, -math.inf):
        calls = [(begin, [1.0, bad]), (judge, search, [bad]), (remeasured, search, bad), (ended, search, [bad], False)]
        for function, *arguments in calls:
            with pytest.raises(ValueError, match="finite"):
                function(*arguments)
    with pytest.raises(ValueError, match="at least one"):
        judge(search, [])


# ---------------------------------------------------------------------------------------------------
# Simulated nights


def one_by_one(nights, i):
    """Night i by lab/analysis/verdict.py itself: (true end, keeps that stayed, experiments, steps back)."""
    noise, sigma = nights.noise[i], lambda at: float(nights.sigma(at))
    search, truths = begin([z * sigma(0.0) for z in noise[:3]]), [0.0]
    run, idea, experiments, backs, values = 3, 0, 0, 0, []
    while run < nights.runs:
        again = not values and doubted(search)
        at = truths[-1] + (0 if again else nights.effects[i, idea])
        x, run = at + noise[run] * sigma(at), run + 1
        if again:
            search = remeasured(search, x)
            if not holds(search):
                search, backs = stepped_back(search), backs + 1
                truths.pop()
            continue
        values.append(x)
        experiments += len(values) == 1
        status = judge(search, values).status
        if status != "confirm":
            search, idea, values = ended(search, values, status == "keep"), idea + 1, []
            truths += [at] if status == "keep" else []
    return truths[-1], len(truths) - 1, experiments, backs


@pytest.mark.parametrize(
    "setting",
    [Setting("full", 0.002), Setting("full", 0.0003), Setting("plateau", 0.0007), Setting("zero", 0.002),
     Setting("full", None, "σ falls")],
)  # fmt: skip
def test_the_simulations_rule_is_the_verdicts_run_for_run(setting):
    nights = Nights(setting, 300, 12, seed=4)
    played = play(nights, Rule())
    for i in range(nights.n):
        expected = one_by_one(nights, i)
        assert expected == pytest.approx([played[k][i] for k in ("end", "keeps", "experiments", "backs")], abs=1e-12)


def test_simulated_nights_reach_what_the_docs_promise():
    """In each of the six settings, 100 runs, and on nights without a gain. docs/verdict.md has the whole table, and
    what it falls short of is allowed for here."""
    for setting in [*sim.SIX, Setting("losses", 0.002), Setting("zero", 0.002), Setting("dry", 0.0007)]:
        result = compare(setting, 100, 1000, seed=3)
        new, lower, old = result["new"], result["lower"], result["old"]
        line = sim.row(setting, 100, result)
        if setting.ideas == "full":
            assert new["end"].mean() < 0.98 * min(lower["end"].mean(), old["end"].mean()), line
        if setting.ideas == "plateau":
            assert new["end"].mean() < max(lower["end"].mean() + 1.2e-4, 0) and new["end"].mean() < 1e-4, line
        if setting.ideas in ("losses", "zero"):
            assert new["end"].mean() < 2.5e-4 and new["false"].mean() < 1.3, line
        if setting.ideas != "zero":
            assert new["loss"].mean() < 0.75 * lower["loss"].mean(), line
        if setting.ideas == "dry":
            assert new["end"].mean() < 0.95 * new["turn"].mean(), line
        assert 100 / new["experiments"].mean() < 1.2, line


def test_a_long_night_without_gains_ends_no_higher_than_a_short_one():
    short, long = (play(Nights(Setting("losses", 0.002), runs, 250, 3), Rule()) for runs in (100, 1600))
    assert long["end"].mean() < short["end"].mean() + 1e-4
    assert play(Nights(Setting("losses", 0.002), 1600, 250, 3), sim.OldRule())["end"].mean() > 0.004  # what it replaced
    assert long["false"].mean() < 16


def test_where_sigma_falls_the_rule_finds_out():
    """Nearly as well as where it is told; without the bound by the spread of the results it gains half as much."""
    result = compare(Setting("full", None, "σ falls"), 400, 500, seed=3)
    assert result["new"]["end"].mean() < 0.75 * result["told"]["end"].mean()
    assert result["new"]["end"].mean() < 2 * result["lower"]["end"].mean()


@pytest.mark.slow
def test_at_every_length_and_in_every_setting_false_keeps_cost_less_and_repeats_are_few():
    """The table of docs/verdict.md with fewer nights. What a row there is short of is held by nothing here; the rest,
    with room for the error of so few nights."""
    for runs in sim.LENGTHS:
        for setting in sim.SETTINGS:
            result = compare(setting, runs, 400 if runs < 1600 else 100, seed=2)
            new, lower, line = result["new"], result["lower"], sim.row(setting, runs, result)
            assert runs / new["experiments"].mean() <= 1.2, line
            exempt = runs == 1600 and setting == Setting("full", 0.002, "heavy")  # 0.99, as docs/verdict.md says
            if setting.ideas != "zero":
                assert new["loss"].mean() < (1.1 if exempt else 0.8) * lower["loss"].mean(), line
            if setting.ideas in ("losses", "zero"):
                assert new["end"].mean() < 2.5e-4 and new["false"].mean() < 1.3 * runs / 100, line
            if setting.ideas == "dry":
                assert new["end"].mean() < 0.95 * new["turn"].mean(), line


def test_a_simulated_night_is_as_many_runs_for_every_rule():
    nights = Nights(Setting("full", SIGMA), 100, 50)
    assert (play(nights, sim.LowerWins())["experiments"] == 97).all()
    for rule in (sim.OldRule(), Rule()):
        experiments = play(nights, rule)["experiments"]
        assert (experiments <= 97).all() and experiments.mean() >= 100 / 1.2


def test_simulated_ideas_have_the_published_nights_distribution():
    effects = Nights(Setting("full", SIGMA), 400, 100).effects.ravel()
    gains, losses = np.sort(-effects[effects < 0]), np.sort(effects[effects >= 0])
    assert len(gains) / len(effects) == pytest.approx(22 / 124, abs=0.01)
    assert gains.mean() == pytest.approx(0.00128, rel=0.05)
    assert np.median(gains) == pytest.approx(0.00046, rel=0.05)
    assert gains[-1] <= 0.0119
    for share, quartile in [(0.25, 0.0004), (0.5, 0.0008), (0.75, 0.0016)]:
        assert losses[int(len(losses) * share)] == pytest.approx(quartile, rel=0.05)
    assert sim.quantile(sim.GAINS, 0.5) == pytest.approx(0.00046) and sim.quantile(sim.LOSSES, 0.5) == pytest.approx(0.0008)


def test_a_night_that_dries_up_has_gains_in_its_first_half_only():
    effects = Nights(Setting("dry", SIGMA), 100, 50).effects
    assert (effects[:, :50] < 0).any() and not (effects[:, 50:] < 0).any()
    assert not (Nights(Setting("losses", SIGMA), 100, 50).effects < 0).any()
    assert not Nights(Setting("zero", SIGMA), 100, 50).effects.any()
