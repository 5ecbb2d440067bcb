# SPDX-License-Identifier: Apache-2.0
"""Chat templates that behave as those of well-known bases do, written for these tests."""

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
                                    "it writes a prompt differently once it is answered"),
    "a prompt that is left out": ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}.",
                                  "once it is answered|it leaves out"),
    "an answer in capitals": ("{% for m in messages %}{{ '|' + (m['content'] | upper if m['role'] == 'assistant' else m['content']) }}"
                              "{% endfor %}{% if add_generation_prompt %}|{% endif %}", "it changes the answer 'positive'"),
    "two first tokens": ("{{ bos_token + bos_token }}" + IM + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
                         "begins with .* twice"),
    "not Jinja": ("{% for m in messages %}", "Unexpected end of template"),
    "always an error": ("{{ raise_exception('Not for chats') }}", "Not for chats"),
}  # fmt: skip
