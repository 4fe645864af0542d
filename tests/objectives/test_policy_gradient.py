"""Policy gradients: worked numbers of one fixed group, and what holds of every group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toys import Logits, Told, batch_of, of_length, preset, told

from uft.data.rows import Completion, Kind, Message, Role, Row
from uft.objectives.base import StepContext
from uft.objectives.policy_gradient import KL, SHOWN_WEIGHTS

REWARDS, LENGTHS = (1.0, 0.1, 0.0, 0.1), (3, 2, 4, 1)
LP = [-0.70, -0.20, -0.40, -1.05, -0.50, -1.20, -0.80, -0.30, -0.60, -1.00]
OLD = [-1.00, -0.30, -0.40, -1.00, -0.45, -1.00, -0.80, -0.35, -0.50, -1.00]
REF = [-0.90, -0.30, -0.60, -0.90, -0.60, -0.90, -0.70, -0.40, -0.50, -0.90]
SAMPLER = [-1.10, -0.30, -0.35, -1.00, -0.40, -0.20, -0.90, -0.35, -0.50, -2.20]


def group(rewards=REWARDS, lengths=LENGTHS, shown=(), row=0, **more):
    own = [
        of_length(n, row=row, role=Role.OWN, target=r, good=False, **more)
        for n, r in zip(lengths, rewards, strict=True)
    ]
    return [*(of_length(n, row=row) for n in shown), *own]


def batch(seqs=None, **columns):
    return batch_of(seqs or group(), columns={name: torch.tensor(values) for name, values in columns.items()})


def loss_of(name, policy=LP, seqs=None, old=OLD, reference=None, **changes):
    columns = {} if old is None else {"old": old}
    return told(preset(name, **changes), batch(seqs, **columns), policy, reference)


def advantages(name, seqs=None, **changes):
    return preset(name, **changes).groups(batch(seqs)).advantage.tolist()


def close(found, wanted):
    assert found == pytest.approx(wanted, abs=2e-6)


def test_advantages():
    close(advantages("grpo"), [1.492402, -0.426401, -0.639601, -0.426401])
    close(advantages("dr_grpo"), [0.7, -0.2, -0.3, -0.2])
    close(advantages("rloo", kl=0.0), [0.933333, -0.266667, -0.4, -0.266667])
    spread = float(torch.tensor([*REWARDS, 1, 1, 1, 1]).std())
    both = [*group(annotations={"score_spread": spread}), *group([1] * 4, row=1, annotations={"score_spread": spread})]
    close(advantages("lite", both), [1.446186, -0.413196, -0.619794, -0.413196, 0, 0, 0, 0])
    # the trap of dividing by the spread: a bonus for form weighs as much as being right where nobody is right
    close(advantages("grpo", group((0.1, 0.1, 0.1, 0.0))), [0.49999] * 3 + [-1.49997])


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("grpo", {}, -0.052153),
        ("grpo", {"reduction": "token"}, -0.128064),
        ("dapo", {}, -0.140004),
        ("dr_grpo", {}, -0.018771),
        ("rloo", {"kl": 0.0}, -0.025028),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, -0.068102),
        ("gspo", {}, -0.000229),
    ],
)
def test_losses_of_the_group(name, changes, wanted):
    close(loss_of(name, **changes)[0], wanted)


def test_gradients_of_the_group():
    sequence = [0, -0.137447, -0.124367, 0.050701, 0.050701, 0.032729, 0.039975, 0.042025, 0.036171, 0.106600]
    close(loss_of("grpo")[1], sequence)
    token = [0, -0.164936, -0.149240, 0.040560, 0.040560, 0.052366, 0.063960, 0.067239, 0.057873, 0.042640]
    close(loss_of("grpo", reduction="token")[1], token)
    close(loss_of("gspo")[1], [0] * 9 + [0.1066])
    advantage = torch.tensor(advantages("cispo")).repeat_interleave(torch.tensor(LENGTHS))
    weights = (torch.tensor(LP) - torch.tensor(OLD)).exp().clamp(max=1.2)
    close(loss_of("cispo")[1], (-weights * advantage / 10).tolist())


def test_the_first_update_of_a_rollout():
    """No old log-probs: they are the policy's own. The value says nothing, the gradient is REINFORCE's."""
    for reduction, wanted in (("sequence", 0.0), ("token", -0.06396)):
        close(loss_of("grpo", old=None, reduction=reduction)[0], wanted)
    close(loss_of("dr_grpo", old=None, scale="group")[0], -0.019988)
    a = advantages("grpo")
    close(loss_of("grpo", old=None)[1], [-a[i] / (4 * n) for i, n in enumerate(LENGTHS) for _ in range(n)])
    same = [loss_of(name, policy=OLD, old=None)[1] for name in ("gspo", "grpo")]
    close(same[0], same[1])


def test_dual_clip_bounds_only_what_is_pushed_down():
    seqs = group((0.0, 1.0), (1, 1))
    run = lambda cap: told(  # noqa: E731
        preset("reinforce", dual_clip=cap), batch(seqs, old=[-1.5, -1.0]), [-0.1, -1.0]
    )
    (free, _, _), (bound, slope, _) = run(None), run(3.0)
    close(free, (0.5 * math.exp(1.4) - 0.5) / 2)
    close(bound, (0.5 * 3 - 0.5) / 2)
    assert slope[0] == 0


def test_a_weight_for_what_the_sampler_thought():
    changes = {"sampler_cap": 2.0, "reduction": "token"}
    loss, _, means = told(preset("grpo", **changes), batch(old=OLD, sampler=SAMPLER), OLD)
    close(loss, -0.060311)
    close(means["sampler_gap"], sum(abs(a - b) for a, b in zip(OLD, SAMPLER, strict=True)) / 10)


def test_divergence_in_the_loss_and_in_the_reward():
    for kind, wanted in (("k2", 0.012625), ("k3", 0.012918)):
        changes = {"kl": 0.001, "kl_kind": kind, "entropy": 0.0}
        close(loss_of("uft_rl", reference=REF, **changes)[2]["kl"], wanted)
    close(loss_of("uft_rl", reference=REF, entropy=0.0)[0], -0.128051)
    objective = preset("rloo", kl=0.1)
    penalty = 0.1 * batch().sum(torch.tensor(OLD) - torch.tensor(REF))
    close(objective.groups(batch(), penalty).advantage.tolist(), [0.916667, -0.276667, -0.383333, -0.256667])
    slopes = [told(objective, batch(), OLD, REF)[1], [-x / 32 for x in (0.916667, -0.276667, -0.383333, -0.256667)]]
    close(slopes[0], [slopes[1][i] for i, n in enumerate(LENGTHS) for _ in range(n)])
    assert "kl" not in [n for n, t in objective(batch(), Told(OLD), Told(REF), StepContext()).items() if t.weight]


def test_what_the_estimators_anchor_to():
    """Exact expectations over one categorical: k2 in the loss and k1 in the reward follow KL(policy, reference)."""
    z = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = z.softmax(0)

    def slope(kind):
        free = z.clone().requires_grad_()
        values = KL[kind](free.log_softmax(0) - reference.log())
        (p * values).sum().backward()
        return free.grad.tolist()

    close(slope("k1"), [0, 0, 0])
    close(slope("k2"), [0.285923, -0.228417, -0.057506])
    close(slope("k3"), [0.261488, -0.270832, 0.009344])


def test_a_reward_falls_over_the_last_tokens_of_too_long_completions():
    objective = preset("dapo", longest=20480, overlong=4096)
    lengths = torch.tensor([16384, 17000, 18432, 20480])
    one = group((1.0,) * 4, (1, 1, 1, 1))
    long = replace(batch(one), sequence=torch.arange(4).repeat_interleave(lengths))
    found = preset("dr_grpo").groups(batch(one)).advantage
    assert found.tolist() == [0, 0, 0, 0]
    shaped = replace(objective, scale="none").groups(long).advantage
    close((shaped - shaped[0]).tolist(), [0, -0.150391, -0.5, -1.0])
    cut = replace(batch(one), sequence=torch.arange(3).repeat_interleave(lengths[:3]))  # the last is no target
    close(replace(objective, scale="none").groups(cut).advantage.tolist(), shaped.tolist())


def test_flat_groups():
    flat = group((0.3,) * 4, row=1)
    two = [*group(), *flat]
    lp, old = LP + LP, OLD + OLD
    for name in ("grpo", "dapo", "rloo", "lite", "luffy"):
        changes = {"kl": 0.0} if name == "rloo" else {}
        seqs = [replace(s, annotations={"score_spread": 0.5}) for s in flat]
        alone = told(preset(name, **changes), batch(seqs := [replace(s, row=0) for s in seqs], old=OLD), LP)
        # luffy's entropy bonus acts on every completion; its policy gradient does not
        assert alone[2].get("pg", 0.0) == 0
        assert name == "luffy" or not any(alone[1])
    close(told(preset("dapo"), batch(two, old=old), lp)[0], -0.140004)  # neither sum nor count
    close(told(preset("dapo", drop_flat=False), batch(two, old=old), lp)[0], -0.140004 / 2)


def test_what_changes_nothing():
    assert advantages("grpo", group([0.2 + 0.5 * r for r in REWARDS])) == pytest.approx(advantages("grpo"), abs=1e-5)
    order = [2, 0, 3, 1]
    ends = [sum(LENGTHS[:i]) for i in range(5)]
    mixed = group([REWARDS[i] for i in order], [LENGTHS[i] for i in order])
    lp, old = ([v for i in order for v in side[ends[i] : ends[i + 1]]] for side in (LP, OLD))
    close(told(preset("grpo"), batch(mixed, old=old), lp)[0], -0.052153)
    assert sum(advantages("grpo")) == pytest.approx(0, abs=1e-5)
    # a completion that was cut and is no target stays in the baseline
    masked = group()
    masked[3] = replace(masked[3], supervised=[False, False])
    close(advantages("grpo", masked), advantages("grpo"))
    assert loss_of("grpo", LP[:9], masked, OLD[:9])[2]["pg"] == pytest.approx((4 * -0.052153 - 0.426401) / 3, abs=1e-5)


# --- demonstrations beside own completions


P = [0.9, 0.5, 0.05]
SHOWN = [math.log(p) for p in P]


def test_weights_of_a_demonstrations_tokens():
    wanted = {
        "one": [1, 1, 1],
        "probability": P,
        "bell": [0.09, 0.25, 0.0475],
        "shaped": [0.09, 0.138889, 0.222222],
    }
    for name, values in wanted.items():
        close(SHOWN_WEIGHTS[name](torch.tensor(P)).tolist(), values)
    close(float(SHOWN_WEIGHTS["shaped"](torch.tensor(0.1))), 0.25)


def test_luffy_puts_the_demonstration_into_the_group():
    seqs = group((0.0, 0.0, 1.0), (2, 1, 3), shown=(3,))
    close(advantages("luffy", seqs), [0.5, -0.5, -0.5, 0.5])
    _, slope, means = told(preset("luffy", entropy=0.0), batch(seqs), [*SHOWN, *[-0.5] * 6])
    close([9 * s for s in slope[:3]], [-0.045, -0.069444, -0.111111])
    close([9 * s for s in slope[3:]], [0.5] * 3 + [-0.5] * 3)
    close(means["pg"], 0.0)
    close(advantages("luffy", group((0.0,) * 3, (2, 1, 3), shown=(3,))), [0.75, -0.25, -0.25, -0.25])
    assert advantages("luffy", group((1.0,) * 3, (2, 1, 3), shown=(3,))) == [0, 0, 0, 0]
    close(advantages("grpo", seqs[1:], scale="none"), [-0.333333, -0.333333, 0.666667])


def test_chord_moves_from_demonstrations_to_own_completions():
    objective = preset("chord_mu")
    close([objective.mixed(t) for t in (0, 50, 100, 150, 200, 1000)], [0.9, 0.77552, 0.475, 0.17448, 0.05, 0.05])
    seqs = group(shown=(3,))
    lp, old = [*SHOWN, *LP], [0.0] * 3 + OLD
    for step, mu in ((0, 0.9), (100, 0.475)):
        loss = told(objective, batch(seqs, old=old), lp, context=StepContext(step=step))[0]
        close(loss, (1 - mu) * -0.128064 - mu * sum(SHOWN) / 3)
    bell = told(preset("chord_phi"), batch(seqs, old=old), lp)
    close(bell[2]["shown"], 0.108356)
    close(bell[0], 0.9 * -0.128064 + 0.0108356)


def test_uft_rl_learns_hints_beside_own_completions():
    """Two prompts of two completions; the second has no hint."""
    seqs = [
        *group((1.0, 0.0), (2, 1), shown=(3,)),
        *group((0.1, 1.0), (1, 3), row=1),
    ]
    hint = [-0.4, -0.9, -0.2]
    lp = [*hint, -0.7, -0.2, -1.2, -0.3, -0.5, -0.1, -0.6]
    old = [0.0] * 3 + [-1.0, -0.3, -1.0, -0.3, -0.5, -0.2, -0.6]
    ref = [0.0] * 3 + [-0.9, -0.3, -0.9, -0.4, -0.5, -0.1, -0.9]
    loss, slope, means = told(preset("uft_rl", entropy=0.0), batch(seqs, old=old), lp, ref)
    close(means["pg"], -0.362807)
    close(means["kl"], 0.017012)
    close(means["shown"], 0.5)
    close(loss, -0.362290)
    flat = [replace(s, target=0.5) if s.role == Role.OWN else s for s in seqs]
    _, slope, _ = told(preset("uft_rl", entropy=0.0, kl=0.0), batch(flat, old=old), lp)
    close(slope, [-0.001 / 3] * 3 + [0] * 7)  # .001 times the likelihood's on the hint alone


def test_the_entropy_is_of_the_whole_vocabulary():
    logits = torch.tensor([[[0.5, -0.2, 0.1], [0.0, 1.0, 2.0]], [[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]])
    objective = preset("uft_rl", kl=0.0, entropy=0.5)
    policy = Logits(logits)
    loss = objective(batch(group((0.5, 0.5), (1, 1))), policy, None, StepContext())
    p = logits[:, 0].double().softmax(-1)
    close(float(loss["entropy"].total.detach()), float(-(p * p.log()).sum()))
    assert loss["entropy"].weight == -0.5
    (loss["entropy"].weight * loss["entropy"].total).backward()
    wanted = 0.5 * p * (p.log() - (p * p.log()).sum(-1, keepdim=True))
    close(policy.given.grad[:, 0].flatten().tolist(), wanted.flatten().tolist())


def test_srft_weighs_its_parts_by_the_entropy():
    """The demonstration, two tokens of a right completion and two of a wrong one, under an entropy of .8."""
    seqs = group((1.0, 0.0, 0.0), (2, 1, 1), shown=(3,))

    class Steady(Told):
        def __call__(self, batch, request):
            output = super().__call__(batch, request)
            return replace(output, entropy=torch.full_like(output.log_probs.detach(), 0.8))

    lp = [*SHOWN, math.log(0.6), math.log(0.7), math.log(0.4), math.log(0.2)]
    policy, objective = Steady(lp), preset("srft", shaped=0.0)
    loss = objective(batch(seqs), policy, None, StepContext())
    means = {name: float(term.total.detach() / term.count) for name, term in loss.items()}
    close(means["imitation"] * 0.5, 0.5 * math.exp(-0.8) * 1.264747)
    close(means["right"] * 0.1, 0.1 * math.exp(0.8) * 0.433750)
    close(means["wrong"], -1.262864)
    close(0.5 * math.exp(-0.8), 0.224664)
    close(0.1 * math.exp(0.8), 0.222554)
    # the shaped part has the slope of LUFFY's value A p / (p + gamma): A = .5 among the scores 1, 0, 0 and its own 1
    policy, objective = Steady(lp), preset("srft", imitation=0.0, right=0.0, wrong=0.0)
    objective(batch(seqs), policy, None, StepContext())["shaped"].total.backward()
    close(policy.log_probs.grad[:3].tolist(), [-0.045, -0.069444, -0.111111])
    assert objective.cautions() == []
    assert preset("srft").cautions()


# --- what is taken of a row


def rollout(*scores, shown=True):
    turn = (Message("assistant", "a reply"),)
    own = tuple(Completion(turn, sampled_by="policy", score=score) for score in scores)
    return Row("s", 0, (Message("user", "q"),), ((Completion(turn),) if shown else ()) + own)


def taken(objective, row):
    return [(part.completion, Role(part.role).name) for part in objective.views[Kind.ROLLOUT](row, 0)]


def test_own_completions_under_every_kind_of_objective():
    row = rollout(0.0, 1.0, 0.5)
    assert row.kind is Kind.ROLLOUT
    own = [(i, "OWN") for i in (1, 2, 3)]
    assert taken(preset("grpo"), row) == own
    assert taken(preset("luffy"), row) == [(0, "POSITIVE"), *own]
    assert taken(preset("dpo"), row) == [(2, "POSITIVE"), (1, "NEGATIVE")]
    assert taken(preset("sft"), row) == [(2, "POSITIVE")]
    assert taken(preset("irft"), row) == [(0, "POSITIVE"), *((i, "NEGATIVE") for i in (1, 2, 3))]
    assert taken(preset("rwr"), row) == [(1, "NEGATIVE"), (2, "POSITIVE"), (3, "POSITIVE")]
    assert taken(preset("kto"), row) == [(1, "NEGATIVE"), (2, "POSITIVE"), (3, "POSITIVE")]
    assert taken(preset("dpo"), rollout(0.5, 0.5)) == []  # a tie: nothing, and no reason to stop
    assert taken(preset("dpo"), rollout(0.5)) == []
    assert taken(preset("irft"), rollout(0.5, shown=False)) == []


def test_hpt_imitates_where_no_completion_is_right():
    for gate, scores, wanted in (
        (0, (0.0, 0.1), ["POSITIVE"]),
        (0, (0.0, 1.0), ["OWN", "OWN"]),
        (1, (0.0, 1.0), ["POSITIVE"]),
        (-1, (0.0, 0.0), ["OWN", "OWN"]),
    ):
        assert [role for _, role in taken(preset("hpt", gate=gate), rollout(*scores))] == wanted
    assert taken(preset("hpt"), rollout(0.0, 0.0, shown=False)) == [(0, "OWN"), (1, "OWN")]


def test_reward_weighted_regression():
    scores, lp = (0.2, 1.0, -0.5, 0.4), [-1.1, -2.0, -0.7, -1.5]
    seqs = [of_length(1, row=0, target=score) for score in scores]
    for changes, wanted in (({}, 2.360604), ({"cap": 2.0}, 2.001463), ({"tau": 10.0}, 1.389910), ({"tau": 1e9}, 1.325)):
        close(told(preset("rwr", **changes), seqs, lp)[0], wanted)


def test_contradictions_are_told():
    problems = lambda name, **changes: [key for key, _ in preset(name, **changes).problems()]  # noqa: E731
    assert problems("grpo", kl=0.1, kl_kind="k1") == ["kl_kind"]
    assert problems("rloo") == []
    assert problems("dr_grpo", longest=None) == ["longest"]
    assert problems("chord_mu", mix={"peak": 1.0}) == ["mix"]
    assert problems("chord_mu", shown="none") == ["mix"]
