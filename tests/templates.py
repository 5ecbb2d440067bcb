# SPDX-License-Identifier: Apache-2.0
"""Chat templates that behave as those of well-known bases do, written for these tests, and tokenizers that know their tokens."""

import re
from pathlib import Path

import trl
from transformers import PreTrainedTokenizerFast

SPECIAL = re.compile(
    r"<[|｜][^<>{}'\s]+[|｜]>|</?[a-z_]+>|\[/?[A-Z_]+\]|<[a-z_]+\|>|<\|[a-z_]+>|<seed:\w+>|\[\|\w+\|\]"
)
TRL = {path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, eos: str, bos: str = "<s>", *, special: bool = True
) -> PreTrainedTokenizerFast:
    """The tokenizer with a template, whose special tokens it knows as such."""
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.add_tokens(["\n\n"])  # as Gemma's tokenizer has, and not as a special one
    tokenizer.chat_template = template
    return tokenizer


def wrapped(user: str, assistant: str, ask: str = "", system: str | None = None, first: str = "") -> str:
    """A template that writes each turn in place of the X of its role."""
    cases = [
        f"if m['role'] == '{role}' %}}{{{{ {text!r}.replace('X', m['content']) }}}}"
        for role, text in (("system", system), ("user", user), ("assistant", assistant)) if text is not None
    ]  # fmt: skip
    turns = (
        "{% for m in messages %}{% "
        + "{% el".join(cases)
        + "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
    )
    return f"{{{{ {first!r} }}}}{turns}{{% if add_generation_prompt %}}{{{{ {ask!r} }}}}{{% endif %}}"


def alike(wrap: str, **others: str) -> str:
    """The same with a turn of every role written alike: ROLE stands for it."""
    roles = {role: wrap.replace("ROLE", role) for role in ("user", "assistant", "system")}
    return wrapped(**({"ask": roles["assistant"].partition("X")[0]} | roles | others))


IM_TURN = "<|im_start|>ROLE\nX<|im_end|>\n"
# The template, the tokenizer's eos token, and the token that an answer ends with; None: with none, so that it is refused
WELL_KNOWN = {
    "chatml": (alike(IM_TURN), "<|im_end|>", "<|im_end|>"),
    "chatml, another eos": (alike(IM_TURN), "<|endoftext|>", "<|im_end|>"),
    "internlm2": (alike(IM_TURN, first="<s>"), "</s>", "<|im_end|>"),
    "chatml without line breaks": (alike("<|im_start|>ROLE X<|im_end|>", ask="<|im_start|>assistant"), "</s>", "<|im_end|>"),
    "chatml, eos after it": (alike(IM_TURN, assistant="<|im_start|>assistant\nX<|im_end|>\n</s>"), "</s>", "<|im_end|>"),
    "chatml, a line before its end": (alike("<|im_start|>ROLE\nX\n<|im_end|>\n"), "<|endoftext|>", "<|im_end|>"),
    "chatml, a token of white space before its end": (alike("<|im_start|>ROLE\nX\n\n<|im_end|>\n"), "<|im_end|>", "<|im_end|>"),
    "chatml, text before its end": (alike("<|im_start|>ROLE\nX. Over.<|im_end|>\n"), "<|im_end|>", None),
    "chatml that never ends": (alike("<|im_start|>ROLE\nX\n"), "<|im_end|>", None),
    "vicuna": (wrapped("USER: X ", "ASSISTANT: X</s>", "ASSISTANT:", "X "), "</s>", "</s>"),
    "vicuna, no generation prompt": (wrapped("USER: X\n", "ASSISTANT: X</s>\n", "", "X\n"), "</s>", "</s>"),
    "koala": (wrapped("USER: X ", "GPT: X</s>", "GPT:", "X BEGINNING OF CONVERSATION: "), "</s>", "</s>"),
    "alpaca": (wrapped("### Instruction:\nX\n\n", "### Response:\nX</s>\n", "### Response:\n", "X\n\n"), "</s>", "</s>"),
    "alpaca without end": (wrapped("### Instruction:\nX\n\n", "### Response:\nX\n\n", "### Response:\n", "X\n"), "</s>", None),
    "solar": (wrapped("### User:\nX\n\n", "### Assistant:\nX\n\n", "### Assistant:\n"), "</s>", None),
    "guanaco": (wrapped("### Human: X\n", "### Assistant: X\n", "### Assistant:"), "</s>", None),
    "falcon": (wrapped("User: X\n\n", "Assistant: X\n\n", "Assistant:", "X\n\n"), "<|endoftext|>", None),
    "nemotron-4": (wrapped("<extra>User\nX\n", "<extra>Assistant\nX\n", "<extra>Assistant\n"), "</s>", None),
    "baichuan": (wrapped("<reserved_a>X", "<reserved_b>X", "<reserved_b>", "X"), "</s>", None),
    "chatglm3": (wrapped("<|user|>\n X", "<|assistant|>\n X", "<|assistant|>", "<|system|>\n X"), "</s>", None),
    "starchat": (alike("<|ROLE|>\nX<|end|>\n"), "<|endoftext|>", "<|end|>"),
    "tinyllama": (alike("<|ROLE|>\nX</s>\n"), "</s>", "</s>"),
    "stablelm": (alike("<|ROLE|>\nX<|endoftext|>\n"), "<|endoftext|>", "<|endoftext|>"),
    "openchat": (wrapped("Correct User: X<|end_of_turn|>", "Correct Assistant: X<|end_of_turn|>", "Correct Assistant:"),
                 "</s>", "<|end_of_turn|>"),
    "phi-4": (alike("<|im_start|>ROLE<|im_sep|>X<|im_end|>"), "<|endoftext|>", "<|im_end|>"),
    "deepseek-v2": (wrapped("User: X\n\n", "Assistant: X<｜end▁of▁sentence｜>", "Assistant:", "X\n\n", "<｜begin▁of▁sentence｜>"),
                    "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "olmo-2": (wrapped("<|user|>\nX\n", "<|assistant|>\nX<|endoftext|>", "<|assistant|>\n", "<|system|>\nX\n", "<|endoftext|>"),
               "<|endoftext|>", "<|endoftext|>"),
    "granite": (alike("<|start_of_role|>ROLE<|end_of_role|>X<|end_of_text|>\n"), "<|end_of_text|>", "<|end_of_text|>"),
    "mistral-small": (wrapped("[INST]X[/INST]", "X</s>", "", "[SYSTEM_PROMPT]X[/SYSTEM_PROMPT]", "<s>"), "</s>", "</s>"),
    "exaone": (wrapped("[|user|]X\n", "[|assistant|]X[|endofturn|]\n", "[|assistant|]", "[|system|]X[|endofturn|]\n"),
               "[|endofturn|]", "[|endofturn|]"),
    "hunyuan": (wrapped("<｜User｜>X", "<｜Assistant｜>X<｜place▁holder｜>", "<｜Assistant｜>", "X<｜hy_3｜>"), "</s>", "<｜place▁holder｜>"),
    "kimi": (alike("<|im_ROLE|>ROLE<|im_middle|>X<|im_end|>"), "[EOS]", "<|im_end|>"),
    "seed": (alike("<seed:bos>ROLE\nX<seed:eos>"), "<seed:eos>", "<seed:eos>"),
    "llama-3": (alike("<|start_header_id|>ROLE<|end_header_id|>\n\nX<|eot_id|>", first="<s>"), "<|end_of_text|>", "<|eot_id|>"),
}  # fmt: skip

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TAKE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
)
INST = (
    "{{ bos_token }}"
    + TAKE_SYSTEM
    + "{% for m in turns %}{% if m['role'] == 'user' %}{% if LAST and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ SPACEm['content'] + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IM = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

TEMPLATES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are an assistant of ours.<|im_end|>\n{% endif %}"
        + IM + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-2": (
        TAKE_SYSTEM + "{% for m in turns %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3.1": (
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        + TAKE_SYSTEM + "<|header|>system<|/header|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n"
        "{% if system is defined %}{{ system | trim }}{% endif %}<|eot|>"
        "{% for m in turns %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
    ),
    "mistral-v0.1": INST.replace("LAST", "loop.first").replace("SPACE", "' ' + "),
    "mistral-v0.1-old": (  # as it was at first: no system role, strict turns
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "mistral-v0.3": INST.replace("LAST", "loop.last").replace("SPACE", "' ' + "),
    "nemo": INST.replace("LAST", "loop.last").replace("SPACE", "").replace("[INST] ", "[INST]"),
    "zephyr": TURNS + ASK,
    "gemma": (
        "{{ bos_token }}" + NO_SYSTEM + "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start>' + role + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
    ),
    "phi-3": (  # leaves out a system turn without a word
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    ),
    "qwen2.5": (
        "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n"
        "{% else %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}{% for m in messages %}"
        "{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen3": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}"
    ),
    "smollm3": (  # prints the date, and thinks unless told not to
        "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\n{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] }}{% endif %}<|im_end|>\n{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n"
        "{{ m['content'] }}<|im_end|>\n{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% if not (enable_thinking | default(true)) %}<think>\n\n</think>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not (enable_thinking | default(true)) %}<think>\n\n</think>\n{% endif %}{% endif %}"
    ),
}  # fmt: skip

# What has a system turn; with the others its text opens the user turn.
SYSTEM_TURN = set(TEMPLATES) - {"mistral-v0.1-old", "mistral-v0.3", "nemo", "gemma", "phi-3"}

BROKEN = {
    "an answer that is rewritten": (IM + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
                                    "writes a prompt differently once it is answered"),
    "a prompt that is left out": ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}.",
                                  "once it is answered|leaves out"),
    "an answer in capitals": ("{% for m in messages %}{{ '|' + (m['content'] | upper if m['role'] == 'assistant' else m['content']) }}"
                              "{% endfor %}{% if add_generation_prompt %}|{% endif %}", "it changes the answer 'positive'"),
    "two first tokens": ("{{ bos_token + bos_token }}" + IM + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
                         "begins with .* twice"),
    "not Jinja": ("{% for m in messages %}", "Unexpected end of template"),
    "always an error": ("{{ raise_exception('Not for chats') }}", "Not for chats"),
}  # fmt: skip
