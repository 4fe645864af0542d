"""Help of the verbs over a configuration: examples, common settings, and the choices found on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from uft.cli import VERBS, folded
from uft.config.messages import choices, config_dirs, groups, headline, hint, listing, nearest, written
from uft.config.schema import COLUMNS, MISSING, Config, default_of, fields_of, kind_at
from uft.errors import Problem, UftError

MOST_LINES = 16
"""A group of more choices is listed by their names alone, until it is asked for."""

FIRST = ("objective", "data", "model", "optim", "hardware", "eval", "tracking", "experiment", "sweep", "debug")
HYDRA = """\
Options are Hydra's: -m (several values), --cfg job (print, do nothing), --info, --config-dir DIR, -cn NAME; see
--hydra-help. Your own files: ./conf-user or $UFT_CONF (they win over the shipped ones). docs/*.md:  uft docs"""


@dataclass(frozen=True)
class Page:
    """`uft VERB --help`."""

    keys: str
    examples: str  # lines of a command and what it does, two blanks or more between them
    words: str = ""  # before the options
    note: str = ""
    groups: tuple[str, ...] = ()  # whose choices are listed; (): all


PAGES = {
    "train": Page(
        keys="""
            seed train.steps train.batch_size train.max_length train.eval_every optim.lr model.path model.adapter
            init_from data.ratio data.too_long tracking.mode run.name run.dir sweep.name rounds
            rollout.completions""",
        examples="""\
  uft train objective=ift data=mix                  the embedded model on the embedded mixture
  uft train -m objective=sft,ift,uft seed=1,2,3     nine runs, one after the other
  uft train sweep=beta_ratio                        a sweep written in conf/sweep
  uft train experiment=sft_then_dpo                 a run of two stages
  uft train experiment=spin rounds=3                stages that are repeated: sample, then train on the samples
  uft train data=rows.jsonl model.path=org/name     your rows, your model
  uft train objective=dpo data=pairs init_from=RUN  from another run's weights; RUN@best, RUN@120
  uft train debug=fast                              two steps: does it run at all""",
        note="  -m trains a run for every combination of comma-separated values; run it again to complete it\n",
    ),
    "check": Page(
        keys="train.batch_size train.micro_batch_tokens train.max_length data.too_long data.template",
        examples="""\
  uft check model=smollm2_135m data=mix             will it fit, are the masks right
  uft check data=rows.jsonl                         are these rows usable""",
    ),
    "data": Page(
        keys="data.ratio data.exhaustion data.template data.too_long data.bad_rows train.max_length",
        examples="""\
  uft data data=mix                                 the mixture table, lengths, rows with the trained tokens coloured
  uft data data=mix data.ratio=0.25                 what a ratio does to it
  uft data rows.jsonl                               how your rows are understood""",
        groups=("data", "objective", "model"),
    ),
    "generate": Page(
        keys="""
            generate.temperature generate.top_k generate.top_p generate.max_new_tokens generate.system generate.seeds
            generate.limit generate.out generate.repeats generate.score""",
        examples="""\
  uft generate last 'a question' 'another'          what the newest run answers
  uft generate RUN questions.txt                    a line each; or JSONL, CSV, Parquet; - reads standard input
  uft generate RUN@best 'a question'                the best checkpoint; RUN@120 that of a step
  uft generate org/name 'a question'                any model: a hub id, a folder, builtin:playground
  uft generate RUN                                  samples for its first training prompts, as rows
  uft generate RUN generate.limit=null              for all of them
  uft generate generate.seeds=[0,1,2,3] generate.out=negatives.jsonl  negatives for objective=dft""",
        words="[RUN | MODEL ['question' | FILE | - ...]] ",
        note="  with RUN (a folder, a name or last): the configuration of that run, and its model, of a\n"
        "  stopped run its newest checkpoint\n",
        groups=("data", "model", "hardware", "debug"),
    ),
    "chat": Page(
        keys="""
            generate.temperature generate.top_k generate.top_p generate.max_new_tokens generate.system generate.seeds
            hardware.device""",
        examples="""\
  uft chat                                          with the newest run that has a model
  uft chat RUN@best                                 with a checkpoint; RUN@120 is that of a step
  uft chat RUN OTHER generate.temperature=0         two side by side, greedy
  uft chat org/name generate.system='Be brief.'     with any model: a hub id, a folder, builtin:playground""",
        words="[RUN | MODEL] [OTHER] ",
        note="  in the conversation: /regen, /system TEXT, /clear, /quit\n",
        groups=("hardware",),
    ),
    "eval": Page(
        keys="""
            eval.tasks eval.task_files eval.shot_files eval.task_rows eval.task_tokens eval.rows eval.generate_rows
            eval.max_new_tokens eval.out""",
        examples="""\
  uft eval outputs/DATE/RUN                         its held-out rows, with standard errors
  uft eval RUN data=rows.jsonl                      all rows of a file
  uft eval builtin:playground data=mix              a model that was not trained here: a hub id or a folder too
  uft eval RUN eval.tasks=[ifeval,gsm8k]            benchmark tasks (pip install 'uft-lm[lmeval]')
  uft eval RUN eval=ift                             the tasks of a paper, in its few-shot form
  uft eval RUN eval.tasks=[ifeval] eval.task_files.ifeval=ifeval.jsonl  on local rows""",
        words="[RUN|MODEL] ",
        note="  RUN: a folder, a name or last. The figures go to evals/ in it, and uft compare shows them\n",
        groups=("data", "reward", "model", "eval", "hardware"),
    ),
    "annotate": Page(
        keys="""
            annotate.models annotate.out annotate.temperature annotate.batch_tokens data.too_long model.dtype
            hardware.device""",
        examples="""\
  uft annotate baseline_logp data=instruct annotate.models=[builtin:playground]  for objective=poft
  uft annotate baseline_logp data=mix annotate.models=[org/a,org/b]  the mean over two models
  uft annotate soft_label data=scored annotate.temperature=0.2  for objective=gdpo_soft""",
        words=f"{'|'.join(COLUMNS)} ",
        groups=("data", "model", "hardware", "debug"),
    ),
    "select": Page(
        keys="""
            select.by select.rows select.seed select.out select.past select.dev select.steps select.batch select.lr
            select.eps select.dim select.ridge""",
        examples="""\
  uft select select.by=random select.rows=100 data=instruct  a hundred rows, the same ones whatever is added
  uft select select.by=active_dpo select.rows=64 data=pairs  the pairs that tell a model most
  uft select select.by=pds select.dev=instruct data=pairs  those that lower the loss of a source with share 0""",
        groups=("data", "model", "hardware", "debug"),
    ),
    "config": Page(
        keys="seed train.steps optim.lr data.ratio",
        examples="""\
  uft config objective=dpo data.ratio=0.5  every value, and where it is from
  uft config --diff outputs/DATE/RUN       what a run has that this request has not
  uft train objective=dpo --cfg job        the plain configuration, as Hydra prints it""",
        words="[--diff RUN] ",
    ),
}


def help_text(verb: str, config_dir: str | None = None, asked: Collection[str] = ()) -> str:
    """The page of a verb, or a line on every choice of the groups `asked` for; `config_dir` adds its choices."""
    page, offered = PAGES[verb], groups(config_dirs(config_dir))
    if unknown := [group for group in asked if group not in offered]:
        meant = nearest(unknown[0], offered)
        advice = hint(meant and f"uft {verb} --help {meant}", "groups", [group for group in FIRST if group in offered])
        raise UftError(Problem(unknown[0], "no such group", "command line", (advice,)))
    if asked:
        return folded("\n".join(line for group in asked for line in listed_choices(group, offered[group])))
    usage = f"usage: uft {verb} {page.words}[options] [key=value ...]"
    lines = [f"uft {verb}: {VERBS[verb]}", "", usage, "", page.examples, ""]
    common = columns({key: describe(key) for key in page.keys.split()})
    lines += ["Common settings  (all of them:  uft config)", *common, "", page.note + HYDRA]
    listed = page.groups or (*FIRST, *(group for group in offered if group not in FIRST))
    for group in (group for group in listed if group in offered):
        if len(offered[group]) > MOST_LINES:
            names = ", ".join(offered[group])
            lines += ["", f"{group}=   (a line on each:  uft {verb} --help {group})", f"  {names}"]
        else:
            lines += ["", *listed_choices(group, offered[group])]
    return folded("\n".join(lines))


def listed_choices(group: str, options: Mapping[str, Path]) -> list[str]:
    return [f"{group}=", *columns({name: headline(file) for name, file in options.items()})]


def columns(table: Mapping[str, str]) -> list[str]:
    width = min(max((len(name) for name in table), default=0), 48)
    return [f"  {name:<{width}}  {says}".rstrip() for name, says in table.items()]


def describe(name: str) -> str:
    """A key's line of help and its default in the schema."""
    above, _, last = name.rpartition(".")
    field = fields_of(kind_at(tuple(above.split(".")) if above else (), Config))[last]
    listed, default = choices(field.annotation), default_of(field)
    shown = "" if default in (MISSING, None, {}, []) else f"  [{written(default)}]"
    return f"{field.description}{f' ({listing(listed)})' if listed else ''}{shown}"
