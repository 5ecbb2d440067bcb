# SPDX-License-Identifier: Apache-2.0
"""The arguments of the training recipes: parsed strictly, checked before any work, and recorded."""

import dataclasses
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from finteam_experts.threads import has_bf16_units

import torch
import yaml
from accelerate import PartialState
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from transformers import PretrainedConfig
from trl import ModelConfig, SFTConfig, TrlParser

from finteam_experts.data.mixture import row_limits
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError, nearest
from finteam_experts.families import is_moe
from finteam_experts.files import read_yaml
from finteam_experts.training.refused import check_bounds, check_settings, default_of

# Settings that change what is shown, kept or where it is, never the weights: two runs may differ in them.
_NOT_INPUTS = (
    "output_dir", "run_dir", "data_dir", "merge_config", "model_name_or_path", "use_cpu", "disable_tqdm", "report_to",
    "run_name", "project", "trackio", "logging_", "log_", "save_", "hub_", "push_to_hub",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataset_num_proc", "resume_from_checkpoint", "local_rank", "ddp_", "accelerator_config", "debug",
    "role", "corpus", "routing_", "dataset_name", "dataset_config", "dataset_train_split", "datasets", "dataset_roles", "activation_checkpointing", "gradient_checkpointing",
)  # fmt: skip


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
        metadata={"help": "Let every row count alike in the loss, however many tokens its answer has."},
    )
    stratify_rows: bool = field(
        default=True,
        metadata={"help": "Spread the rows of each label and of each role's conversations evenly over an epoch."},
    )
    cpu_speedups: bool = field(default=True, metadata={"help": "Use what makes training fast on a CPU."})

    @property
    def data(self) -> Path:
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
        if self.rows_per_step % (processes * rows):
            raise InputError(
                f"rows_per_step is {self.rows_per_step}, which {processes} processes of per_device_train_batch_size {rows} can't "
                f"share equally. Launch another number of processes, or set one of the two so that {self.rows_per_step} is a "
                "multiple of processes times per_device_train_batch_size."
            )
        training_args.gradient_accumulation_steps = self.rows_per_step // (processes * rows)


@dataclass
class TaskRowArguments:
    rows_per_task: int | None = field(default=None, metadata={"help": "At most this many train rows of each task."})
    rows_of_task: dict | str | None = field(
        default=None, metadata={"help": "Another limit for some tasks, as {stock_movement: 160}."}
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

        With `allowed` it may be on modules of these names alone. All else in the decoder layers can be merged, and an MoE's
        router trained in full.
        """
        targets, parameters = self.lora_target_modules or [], self.lora_target_parameters
        if not self.use_peft or not (targets or parameters):
            raise InputError(
                "use_peft is false or lora_target_modules is empty. These recipes train a LoRA: name its modules."
            )
        if "all-linear" in targets:
            raise InputError(
                "lora_target_modules is all-linear, which takes in an MoE's router too. Name the modules."
            )
        if allowed is not None and (not set(targets) <= set(allowed) or parameters):
            raise InputError(
                f"lora_target_modules is {', '.join(targets)}{' with lora_target_parameters' if parameters else ''}. A role "
                f"expert adapts {', '.join(allowed)} only: the merge takes attention from the base and would drop the rest."
            )
        for outside in ("lm_head", "embed_tokens", "norm"):
            if any(outside == target or target.endswith(f".{outside}") for target in targets):
                raise InputError(
                    f"lora_target_modules names {outside}. A merge takes over what is in the decoder layers' attention, MLP "
                    "and router: leave it out."
                )
        saved = set(self.lora_modules_to_save or ())
        if "gate" in saved and is_moe(config) and config.num_experts_per_tok == 1:
            raise InputError(
                "lora_modules_to_save names gate, and each token of this model has one expert, with all of the weight: its router "
                "gets no gradient from the answers. Merge with --experts_per_token 2, or fit it: scripts/fit_router.py."
            )
        if saved - ({"gate"} if is_moe(config) and allowed is None else set()):
            raise InputError(
                f"lora_modules_to_save is {', '.join(sorted(saved))}. A merge takes over a LoRA and, in the tuning of an MoE, a "
                "router that is trained in full (gate): leave the rest out."
            )


def parse(argument_classes: tuple[type, ...]) -> tuple[Any, ...]:
    """Parse the command line and its `--config` YAML into dataclasses.

    Raises `InputError` for an unknown key, a value of a wrong type and a setting that the pipeline would not follow.
    """
    fields = {f.name: f for cls in argument_classes for f in dataclasses.fields(cls)}
    recipe = {}
    if "--config" in sys.argv:
        if sys.argv[-1] == "--config":
            raise InputError("--config needs a recipe: --config recipes/sample/train_expert.yaml")
        recipe = read_recipe(Path(sys.argv[sys.argv.index("--config") + 1]), argument_classes)
    try:
        parser = TrlParser(argument_classes, allow_abbrev=False)
        if "bf16" in fields and (recipe.get("use_cpu") or not torch.accelerator.is_available()):
            parser.set_defaults(bf16=has_bf16_units())
        *parsed, unknown = parser.parse_args_and_config(return_remaining_strings=True)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        given = getattr(error, "doc", None)  # of a JSONDecodeError, which names no key
        raise InputError(f"the value {given} is not JSON: {error}." if given else str(error)) from None
    if unknown:
        known = {*fields, "base", "config"}
        raise InputError(f"unknown argument '{unknown[0]}'.{nearest(unknown[0].lstrip('-').split('=')[0], known)}")
    for arguments in parsed:
        check_settings(arguments)
        if isinstance(arguments, SFTConfig):  # created early: it picks the CPU backend where the recipe asks for it
            PartialState(cpu=arguments.use_cpu)
    return tuple(parsed)


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
        check_bounds(f"{path}: {key}", key, value)
        if isinstance(value, float) and types[key] in (int, int | None):
            raise InputError(f"{path}: {key} is {value!r}; it must be a whole number, without a point.")
    return recipe


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
