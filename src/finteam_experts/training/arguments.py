# SPDX-License-Identifier: Apache-2.0
"""The arguments of the training recipes: parsed strictly, checked before any work, and recorded.

Every setting acts, or is refused by name: tests/training/test_settings.py walks over all of them.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from finteam_experts.threads import has_bf16_units

import torch
import yaml
from accelerate import PartialState
from peft import get_peft_model
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from transformers import PretrainedConfig, Trainer, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config

from finteam_experts.data.mixture import row_limits
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError, check_number, is_main_process, nearest
from finteam_experts.families import is_moe
from finteam_experts.files import read_yaml
from finteam_experts.models import empty_model
from finteam_experts.training.experts import adapts_linear_experts, split_experts

# Settings that change what is shown, kept or where it is, never the weights: two runs may differ in them.
_NOT_INPUTS = (
    "output_dir", "run_dir", "data_dir", "merge_config", "model_name_or_path", "use_cpu", "disable_tqdm", "report_to",
    "run_name", "project", "trackio", "logging_", "log_", "save_", "hub_", "push_to_hub",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataloader_multiprocessing_context", "dataset_num_proc", "local_rank", "ddp_", "accelerator_config", "debug", "do_train",
    "skip_memory_metrics", "torch_empty_cache_steps", "enable_jit_checkpoint", "resume_from_checkpoint",
    "role", "corpus", "routing_", "dataset_name", "dataset_config", "dataset_train_split", "datasets", "dataset_roles",
    "activation_checkpointing", "gradient_checkpointing", "activation_offloading", "include_num_input_tokens_seen",
)  # fmt: skip

_BASE = "The later steps use the base's own: put it into the base's folder, and name that folder with --base."
_SCORED = "Nothing is evaluated while a recipe trains: scripts/evaluate.py scores the models, on validation rows with --split valid."
_PUSHED = "scripts/publish.py pushes a run to the Hub, with its cards."
_LOSS = "A tuning's loss is on the answers, an expert's on all of its text."
_RESUMED = "The same command resumes by itself, and ends with the weights of a training that was never interrupted."
_PREPARED = "Rows are prepared by this package."
# Settings of TRL's that have no effect here or that the later steps would not follow, by name or by its beginning
_REFUSED = {
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), _BASE),
    "trust_remote_code": "Bases are of families that transformers has itself.",
    "model_revision": "Download that revision with `hf download ID --revision REVISION --local-dir DIR`, and name it with --base.",
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), _LOSS),
    "dataset_text_field": "Corpora have the column text; --corpus_column names another one of streamed files.",
    **dict.fromkeys(("dataset_kwargs", "remove_unused_columns", "length_column_name"), _PREPARED),
    "truncation_mode": "Texts are cut at their end or not at all.",
    **dict.fromkeys(("eval_", "do_eval", "do_predict", "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model",
                     "greater_is_better", "include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "label_names",
                     "bf16_full_eval", "fp16_full_eval"), _SCORED),
    **dict.fromkeys(("push_to_hub", "hub_"), _PUSHED),
    **dict.fromkeys(("resume_from_checkpoint", "ignore_data_skip", "save_only_model", "restore_callback_states_from_checkpoint",
                     "dataloader_in_order"), _RESUMED),
    "auto_find_batch_size": "It would change the batch while training: set per_device_train_batch_size to what fits.",
    "parallelism_config": "Rows of a padding-free batch would see each other. Launch with recipes/accelerate/fsdp2.yaml.",
    "use_cache": "A training keeps no cache.",
    "lora_task_type": "These recipes train causal language models: leave it out.",
}  # fmt: skip
# Settings that act only while another one is on
_NEEDS = {
    "packing_strategy": "packing", "liger_kernel_config": "use_liger_kernel", "fsdp_config": "fsdp",
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "load_in_4bit"),
}  # fmt: skip
# Settings that only some optimizers and schedules use
_OF_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")
_OF_SCHEDULE = ("lr_scheduler_kwargs", "warmup_steps")
# How long a training is: one of them says it, and the command line's goes before the recipe's
_LENGTHS = ("max_steps", "num_train_epochs", "steps_per_task", "match_steps")
_NO_LENGTH = (None, False, -1, "-1", "false", "none", "null")
# Variables in which accelerate hands on its config, the values that a training follows, and what to do with others
_ENVIRONMENT = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", "none", "auto"), "Set gradient_accumulation_steps or rows_per_step in the recipe."),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "Launch with recipes/accelerate/fsdp2.yaml."),
    **{f"PARALLELISM_CONFIG_{cut}_SIZE": (("1", "none"), _REFUSED["parallelism_config"]) for cut in ("TP", "CP", "SP")},
}  # fmt: skip

# Numbers that torch and PEFT refuse in the middle of a run, or take to mean something else, by what they have to be.
_BOUNDS: dict[str, dict[str, float]] = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
                     "logging_steps", "save_steps", "save_total_limit", "max_length", "lora_r", "lora_alpha"), {"above": 0}),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "neftune_noise_alpha", "router_aux_loss_coef",
                     "dataloader_num_workers", "routing_steps"), {"least": 0}),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), {"least": 0, "below": 1}),
    **dict.fromkeys(("seed", "data_seed"), {"least": 0, "below": 2**32}),
    **dict.fromkeys(("heldout_passages", "routing_passages", "rows_per_step", "steps_per_task"), {"least": 1}),
    "chat_share": {"least": 0, "most": 1},
}  # fmt: skip


@dataclass
class RunArguments:
    run_dir: str = field(
        default="outputs/quickstart", metadata={"help": "Run folder; every step has its place in it."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Data directory. Defaults to RUN_DIR/data."})
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "Rows of an optimiser step in all processes together; sets gradient_accumulation_steps."},
    )
    balance_rows: bool = field(
        default=False,
        metadata={
            "help": "Let every row of a step count alike in the loss, however many tokens its answer has; of a packed corpus, every "
            "passage or piece of one."
        },
    )
    stratify_rows: bool = field(
        default=True,
        metadata={
            "help": "Spread the rows of each label and of each role's conversations evenly over an epoch. A corpus alone has no strata."
        },
    )
    cpu_speedups: bool = field(default=True, metadata={"help": "Use what makes training fast on a CPU."})

    @property
    def data(self) -> Path:
        """The data directory; `InputError` if `data_dir` names one that does not exist."""
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise InputError(f"data_dir {self.data_dir} is not a folder. Name one, or leave it out for RUN_DIR/data.")
        return Path(self.data_dir or Path(self.run_dir) / "data")

    def share_batch(self, training_args: SFTConfig) -> None:
        """Set how often each process accumulates gradients, so that an optimiser step has `rows_per_step` rows anywhere.

        Raises `InputError` if the processes can't share them equally.
        """
        if self.rows_per_step is None:
            return
        processes, rows = PartialState().num_processes, training_args.per_device_train_batch_size
        if training_args.gradient_accumulation_steps != 1:
            raise InputError("rows_per_step and gradient_accumulation_steps are both set. Leave the second one out.")
        training_args.gradient_accumulation_steps, missing = divmod(self.rows_per_step, processes * rows)
        if missing:
            raise InputError(
                f"rows_per_step is {self.rows_per_step}, which {processes} processes of per_device_train_batch_size {rows} can't "
                "share equally. Launch another number of processes, or change one of the two."
            )


@dataclass
class TaskRowArguments:
    rows_per_task: int | None = field(default=None, metadata={"help": "At most this many train rows of each task."})
    rows_of_task: dict | str | None = field(
        default=None, metadata={"help": "Another limit for some tasks, as {stock_movement: 160}."}
    )
    hold_out_validation: bool = field(
        default=False, metadata={"help": "Leave out the train rows that evaluate.py --split valid scores."}
    )

    def limits(self, tasks: Tasks) -> dict[str, int | None]:
        """The most train rows to take of each of the data's tasks; `InputError` for wrong limits."""
        of_task = self.rows_of_task
        try:
            of_task = yaml.safe_load(of_task) if isinstance(of_task, str) else of_task
        except yaml.YAMLError:
            raise InputError(f"rows_of_task is {of_task!r}; write it as '{{stock_movement: 160}}'.") from None
        return row_limits(tasks, self.rows_per_task, of_task)


@dataclass
class BaseModelConfig(ModelConfig):
    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--base"], "help": "Dense base: Hub id or folder. Defaults to RUN_DIR/base."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the frozen weights. Default: bfloat16 where a CPU trains in bf16, otherwise float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(
            self.lora_target_modules, str
        ):  # TRL takes a list of one apart, and PEFT reads a string as a pattern
            self.lora_target_modules = [self.lora_target_modules]

    def check_lora(self, config: PretrainedConfig, *, allowed: Collection[str] | None = None) -> None:
        """Raise `InputError` unless this is a LoRA that the pipeline can merge into a model of that config.

        Every name has to match modules of the model's decoder layers. With `allowed` it may be on modules of these names alone. All
        else in the decoder layers can be merged, and an MoE's router trained in full.
        """
        targets, parameters, saved = (
            names or [] for names in (self.lora_target_modules, self.lora_target_parameters, self.lora_modules_to_save)
        )
        if not self.use_peft or not (targets or parameters):
            raise InputError(
                "use_peft is false or lora_target_modules is empty. These recipes train a LoRA: name its modules."
            )
        if allowed is not None and (parameters or not set(targets) <= set(allowed)):
            raise InputError(
                f"lora_target_modules is {', '.join(targets)}{' with lora_target_parameters' if parameters else ''}. A role "
                f"expert adapts {', '.join(allowed)} only: the merge takes attention from the base and would drop the rest."
            )
        if set(saved) - ({"gate"} if is_moe(config) and allowed is None else set()):
            raise InputError(
                f"lora_modules_to_save is {', '.join(sorted(saved))}. A merge takes over a LoRA and, in the tuning of an MoE, a "
                "router that is trained in full (gate): leave the rest out."
            )
        if saved and config.num_experts_per_tok == 1:
            raise InputError(
                "lora_modules_to_save names gate, and each token of this model has one expert, with all of the weight: its router "
                "gets no gradient from the answers. Merge with --experts_per_token 2, or fit it: scripts/fit_router.py."
            )
        model = empty_model(config)
        if adapts_linear_experts(config, targets):
            split_experts(model)
        modules, tensors = ([name for name, _ in part] for part in (model.named_modules(), model.named_parameters()))
        wanted = [("lora_target_modules", name, modules) for name in targets]
        for key, name, known in [*wanted, *(("lora_target_parameters", name, tensors) for name in parameters)]:
            places = [place for place in known if place == name or place.endswith(f".{name}")]
            if not places:
                hint = nearest(name.rpartition(".")[2], {place.rpartition(".")[2] for place in known})
                raise InputError(f"{key} names '{name}', and the model has nothing of that name.{hint}")
            if not all(".layers." in place for place in places):
                raise InputError(
                    f"{key} names {name}. A merge takes over what is in the decoder layers alone: leave it out."
                )
        try:
            get_peft_model(model, get_peft_config(self), low_cpu_mem_usage=True)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"PEFT can't make this LoRA: {error}") from None


def parse(argument_classes: tuple[type, ...]) -> tuple[Any, ...]:
    """Parse the command line and its `--config` YAML into dataclasses.

    Raises `InputError` for an unknown key, a value of a wrong type and a setting that the pipeline would not follow.
    """
    fields = {f.name: f for cls in argument_classes for f in dataclasses.fields(cls)}
    words, recipe = sys.argv[1:], {}
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise InputError("--config needs a recipe: --config recipes/sample/train_expert.yaml")
        recipe = read_recipe(Path(words[at + 1]), argument_classes)
        del words[at : at + 2]
    recipe = _without_replaced(recipe)
    try:
        parser = TrlParser(argument_classes, allow_abbrev=False)
        if "bf16" in fields and (recipe.get("use_cpu") or not torch.accelerator.is_available()):
            parser.set_defaults(bf16=has_bf16_units())
        parser.set_defaults_with_config(**recipe)
        *parsed, unknown = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        given = getattr(error, "doc", None)  # of a JSONDecodeError, which names no key
        raise InputError(f"the value {given} is not JSON: {error}." if given else str(error)) from None
    if unknown:
        known = {*fields, "base", "config"}
        raise InputError(f"unknown argument '{unknown[0]}'.{nearest(unknown[0].lstrip('-').split('=')[0], known)}")
    _check_settings(parsed)
    for arguments in parsed:
        if isinstance(arguments, SFTConfig):  # created early: it picks the CPU backend where the recipe asks for it
            PartialState(cpu=arguments.use_cpu)
    return tuple(parsed)


def given_options() -> dict[str, str]:
    """The options of the command line, each with the word that follows it."""
    given, words = {}, sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else following
    return given


def _without_replaced(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the settings that the command line replaces by others: they are named on the screen.

    Raises `InputError` if two settings of one place say how long the training is.
    """
    given = given_options()
    chosen = [name for name in _LENGTHS if given.get(name, "none").lower() not in _NO_LENGTH]
    replaced = dict.fromkeys(_LENGTHS, chosen[0]) if chosen else {}
    replaced |= {name: needed for name, needed in _NEEDS.items() if given.get(needed, "").lower() == "false"}
    for one, other in itertools.permutations(("rows_per_step", "gradient_accumulation_steps")):
        replaced |= {other: one} if one in given else {}
    if schedule := given.get("lr_scheduler_type"):
        replaced |= dict.fromkeys(_OF_SCHEDULE[: 1 + (schedule == "constant")], "lr_scheduler_type")
    replaced = {name: by for name, by in replaced.items() if name in recipe and name not in given}
    recipe = {name: value for name, value in recipe.items() if name not in replaced}
    lengths = chosen or [name for name in _LENGTHS if name not in given and recipe.get(name) not in _NO_LENGTH]
    if len(lengths) > 1:
        raise InputError(
            f"{' and '.join(lengths)} are both set, and each says how long the training is. Leave one out."
        )
    for name, by in replaced.items():
        if is_main_process():
            print(f"--{by} replaces the recipe's {name}")
    return recipe


def read_recipe(path: Path, argument_classes: tuple[type, ...], *, other_keys: bool = False) -> dict[str, Any]:
    """A recipe's content, checked against these dataclasses.

    Raises `InputError` for a value of a wrong type or size, and for a key that they don't have, unless `other_keys` may be
    there.
    """
    fields = {f.name: f for cls in argument_classes for f in dataclasses.fields(cls)}
    types = {name: hint for cls in argument_classes for name, hint in get_type_hints(cls).items()}
    recipe = read_yaml(path)
    for key, value in recipe.items():
        if key not in fields:
            if other_keys:
                continue
            hint = " Did you mean 'model_name_or_path'?" if key == "base" else nearest(str(key), fields)
            raise InputError(f"{path}: unknown key '{key}'.{hint}")
        if value == fields[key].default:
            continue
        if isinstance(value, str) and types[key] == list[str] | None:
            value = [value]
        choices = fields[key].metadata.get("choices")
        if choices and value not in choices:
            listed = list(map(str, choices))
            raise InputError(
                f"{path}: {key} is {value!r}; it is one of {', '.join(listed)}.{nearest(str(value), listed)}"
            )
        try:
            TypeAdapter(types[key]).validate_python(value)
        except (PydanticSchemaGenerationError, PydanticUserError):  # a type that pydantic does not know
            continue
        except ValidationError as error:
            raise InputError(f"{path}: {key} is {value!r}: {error.errors()[0]['msg'].lower()}.") from None
        _check_bounds(f"{path}: {key}", key, value)
        if isinstance(value, float) and types[key] in (int, int | None):
            raise InputError(f"{path}: {key} is {value!r}; it must be a whole number, without a point.")
    return recipe


def output_folder(training_args: SFTConfig, default: Path) -> Path:
    """The folder that a recipe writes: `output_dir`, or its place in the run folder."""
    return default if training_args.output_dir in (None, "trainer_output") else Path(training_args.output_dir)


def keep_rows_whole(training_args: SFTConfig) -> None:
    """Have TRL neither cut nor pack rows that are prepared: packing is for a corpus, and would sort rows of several kinds by length.

    Raises `InputError` if the command line asks for packing.
    """
    if training_args.packing and given_options().get("packing", "").lower() == "true":
        raise InputError("packing is true, and it is for a corpus alone (--learn_from null). Leave it out.")
    training_args.max_length, training_args.packing, training_args.packing_strategy = None, False, "bfd"


def settings(*arguments: Any) -> dict[str, Any]:
    """The settings that differ from their defaults and can change the weights, by name, an explicit null among them.

    What overrides a recipe from outside is recorded as it is: accelerate's mixed precision and, unless `rows_per_step` makes
    it irrelevant, the number of processes.
    """
    left_out = _NOT_INPUTS
    shared = any(getattr(group, "rows_per_step", None) for group in arguments)
    if shared:
        left_out += ("gradient_accumulation_steps",)  # it follows from the number of processes
    changed: dict[str, Any] = {}
    for group in arguments:
        for f in dataclasses.fields(group):
            value = getattr(group, f.name)
            if f.init and not f.name.startswith(left_out) and value != default_of(f):
                plain = value is None or isinstance(value, bool | int | float | str | list | dict)
                changed[f.name] = value if plain else str(value)
        if isinstance(group, SFTConfig):
            changed["mixed_precision"] = group.mixed_precision
    if not shared and PartialState().num_processes > 1:
        changed["processes"] = PartialState().num_processes
    return changed


def _check_settings(groups: Collection[Any]) -> None:
    """Raise `InputError` for the first setting that a recipe can't have, or that would have no effect beside the others."""
    values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
    for group in groups:
        for f in dataclasses.fields(group):
            value = values[f.name]
            if value == default_of(f) or f.name == "output_dir":
                continue
            value = value.value if isinstance(value, Enum) else value
            for name, reason in _REFUSED.items() if isinstance(group, SFTConfig | ModelConfig) else ():
                if f.name == name or (name.endswith("_") and f.name.startswith(name)):
                    raise InputError(f"{f.name} is {value!r}, which a recipe can't set. {reason}")
            if not values.get(needed := _NEEDS.get(f.name), True):
                raise InputError(f"{f.name} is {value!r}, and has no effect without {needed}. Leave it out.")
            _check_bounds(f.name, f.name, value)
        if isinstance(group, SFTConfig):
            if group.save_strategy == "best":
                raise InputError(f"save_strategy is 'best'. {_SCORED} Set it to steps or epoch.")
            if group.loss_type == "dft" and group.label_smoothing_factor:
                raise InputError("label_smoothing_factor is set, and loss_type dft has none. Leave one of them out.")
            _check_used(group, "optim", _OF_OPTIMIZER, _optimizer)
            _check_used(group, "lr_scheduler_type", _OF_SCHEDULE, _learning_rates)
            _check_launch(group)
    if values.get("balance_rows") and values.get("packing") and values.get("packing_strategy") == "wrapped":
        raise InputError(
            "balance_rows is true and packing_strategy wrapped, which forgets where a passage ends. Set packing_strategy: bfd_split."
        )


def _check_bounds(title: str, key: str, value: Any) -> None:
    """Raise `InputError`, which calls the setting `title`, for a number that the setting `key` can't have."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_number(title, value, **_BOUNDS.get(key, {}))


def _check_used(arguments: SFTConfig, setting: str, names: Collection[str], made: Callable[[Any], object]) -> None:
    """Refuse those of the settings `names` that change nothing of what is `made` of all settings, or a wrong one."""
    chosen, options = getattr(arguments, setting).value, vars(arguments)
    try:
        used = made(SimpleNamespace(**options))
    except Exception as error:
        if "model" in str(error):  # an optimizer that looks at the model first
            return
        raise InputError(
            f"{setting} is {chosen}: {error}. It goes with {', '.join(names)}: set them together."
        ) from None
    for f in dataclasses.fields(arguments):
        if f.name not in names or options[f.name] in (default_of(f), {}):
            continue
        try:
            unused = made(SimpleNamespace(**options | {f.name: default_of(f)})) == used
        except (TypeError, ValueError, ArithmeticError):  # it can't do without
            continue
        if unused:
            raise InputError(f"{f.name} is {options[f.name]!r}, which {setting} {chosen} does not use. Leave it out.")


def _optimizer(arguments: Any) -> object:
    return str(Trainer.get_optimizer_cls_and_kwargs(arguments))


def _learning_rates(arguments: Any, steps: int = 100) -> object:
    """Those of a training of so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    options, warmup = arguments.lr_scheduler_kwargs, SFTConfig.get_warmup_steps(arguments, steps)
    if options and 0 < options.get("num_decay_steps", 0) < 1:  # a share: see `RecipeTrainer.create_scheduler`
        options = options | {"num_decay_steps": options["num_decay_steps"] * steps}
    kind = arguments.lr_scheduler_type
    schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    rates = []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


def _check_launch(arguments: SFTConfig) -> None:
    """Refuse what accelerate's config says and the trainer would not follow."""
    for f in dataclasses.fields(AcceleratorConfig):
        value = getattr(arguments.accelerator_config, f.name)
        followed = f.name == "non_blocking" or (isinstance(value, dict) and set(value) == {"sync_each_batch"})
        if value != default_of(f) and not followed:
            raise InputError(
                f"accelerator_config has {f.name} {value!r}, which a recipe can't set. rows_per_step says how many rows a step has."
            )
    bf16, fp16 = arguments.bf16, arguments.fp16
    alike = ("no", "none", "fp16" if fp16 else "bf16" if bf16 else "no"), f"The recipe has bf16 {bf16}, fp16 {fp16}."
    for name, (followed, advice) in (_ENVIRONMENT | {"ACCELERATE_MIXED_PRECISION": alike}).items():
        if (value := os.environ.get(name, followed[0])).lower() not in followed:
            raise InputError(
                f"accelerate's config sets {name} to {value}, which the training would not follow. {advice}"
            )


def default_of(f: dataclasses.Field) -> Any:
    """The value of a dataclass's field that nobody sets."""
    return f.default_factory() if callable(f.default_factory) else f.default
