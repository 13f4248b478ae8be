"""Chat templates that behave as those of well-known families of models do, each reduced to what matters here.

`{% generation %}` marks what is to be learned: everything after an assistant's header, up to and with the token that
ends the turn. `Family.template` is the template without those marks; `Family.marked` has them, as the measure.
"""

from __future__ import annotations

from dataclasses import dataclass

_MARKS = ("{% generation %}", "{% endgeneration %}")


@dataclass(frozen=True)
class Family:
    """A template and the control tokens that it writes; `bos` and `eos` are two of the tokenizer's."""

    marked: str
    control: tuple[str, ...]
    bos: str | None
    eos: str

    @property
    def template(self) -> str:
        return self.marked.replace(_MARKS[0], "").replace(_MARKS[1], "")


def _joined(text: str) -> str:
    return "".join(line.strip() for line in text.splitlines())


# A default system prompt, tools in it, and results of tools that share one user's turn.
_QWEN25 = _joined(r"""
{% set system = messages[0].content if messages[0].role == 'system' else 'You are a helper.' %}
{{ '<|im_start|>system\n' + system }}
{% if tools %}{{ '\n\n# Tools\n' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{% endif %}
{{ '<|im_end|>\n' }}
{% for m in messages %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}
{% for c in m.tool_calls or [] %}
{{ '\n' if m.content or not loop.first }}
{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{{ '}\n</tool_call>' }}
{% endfor %}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{% elif m.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")

# Thoughts only after the last question, taken out of the content too, and an empty one before the last answer.
_QWEN3 = _joined(r"""
{% if messages[0].role == 'system' or tools %}
{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{% for t in tools or [] %}{{ '\n' + t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{% endif %}
{% set ns = namespace(query=-1) %}
{% for m in messages %}
{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set ns.query = loop.index0 %}{% endif %}
{% endfor %}
{% for m in messages %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{% set content = m.content %}{% set thought = m.reasoning_content or '' %}
{% if not thought and '</think>' in content %}
{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{% set content = content.split('</think>')[-1].lstrip('\n') %}
{% endif %}
{{ '<|im_start|>assistant\n' }}{% generation %}
{% if loop.index0 > ns.query and (loop.last or thought) %}
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{% else %}{{ content }}{% endif %}
{% for c in m.tool_calls or [] %}
{{ '\n' if content or not loop.first }}
{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{{ '}\n</tool_call>' }}
{% endfor %}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{% elif m.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")

# BOS, a system turn with the date whether or not the row has one, tools in the first question, one call a turn.
_LLAMA3 = _joined(r"""
{{ bos_token }}
{% set ns = namespace(told=not tools) %}
{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + strftime_now('%d %b %Y') + '\n\n' + system }}
{{ '<|eot_id|>' }}
{% for m in messages %}
{% if m.role == 'system' and loop.first %}
{% elif m.role == 'user' %}
{{ '<|start_header_id|>user<|end_header_id|>\n\n' }}
{% if not ns.told %}{{ 'Functions:\n' }}{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}
{% set ns.told = true %}
{{ m.content | trim + '<|eot_id|>' }}
{% elif m.tool_calls %}
{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{% set call = m.tool_calls[0].function %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}
{{ '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}{% endgeneration %}
{% elif m.role == 'assistant' %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}
{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{% else %}
{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{{ m.content | tojson if m.role == 'tool' else m.content | trim }}{{ '<|eot_id|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""")

# No generation prompt; tools and system prompt stand in the last question; roles must alternate.
_MISTRAL = _joined(r"""
{{ bos_token }}
{% set ns = namespace(system='', last=-1, users=0) %}
{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}
{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{% if (m.role == 'user') != (ns.users % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set ns.users = ns.users + 1 %}
{% endif %}
{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}
{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{ '[INST] ' }}{{ ns.system if loop.index0 == ns.last }}{{ m.content + '[/INST]' }}
{% elif m.tool_calls %}
{% generation %}{{ '[TOOL_CALLS] [' }}
{% for c in m.tool_calls %}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}' }}
{{ ', ' if not loop.last }}
{% endfor %}
{{ ']</s>' }}{% endgeneration %}
{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + '</s>' }}{% endgeneration %}
{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
{% endif %}
{% endfor %}
""")

# The role is called model, contents are trimmed, the system prompt goes into the first question.
_GEMMA3 = _joined(r"""
{{ bos_token }}
{% set system = messages[0].content | trim + '\n\n' if messages[0].role == 'system' else '' %}
{% set turns = messages[1:] if messages[0].role == 'system' else messages %}
{% for m in turns %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m.role == 'assistant' %}
{{ '<start_of_turn>model\n' }}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
{% else %}
{{ '<start_of_turn>' + m.role + '\n' }}{{ system if loop.first }}{{ m.content | trim + '<end_of_turn>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
""")
_GEMMA2 = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + _GEMMA3

# A token more at the very end, where nobody asks for an answer.
_PHI3 = _joined(r"""
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>\n' }}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}
{% elif m.role in ('system', 'user') %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
""")
_PHI4_MINI = _joined(r"""
{% for m in messages %}
{% if m.role == 'system' and tools %}
{{ '<|system|>' + m.content + '<|tool|>' + tools | tojson + '<|/tool|><|end|>' }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>' }}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
""")
_PHI4 = _joined(r"""
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|im_start|>assistant<|im_sep|>' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}
""")

# A default system prompt where the first turn is another's.
_SMOLLM2 = _joined(r"""
{% for m in messages %}
{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}{% endif %}
{% if m.role == 'assistant' %}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")

# A word of the system prompt is a switch; the generation prompt may hold an empty thought.
_SMOLLM3 = _joined(r"""
{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{% set quiet = '/no_think' in system %}
{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '\nReasoning: ' + ('off' if quiet else 'on') + '\n\n' }}
{{ system.replace('/no_think', '').replace('/think', '').rstrip() }}
{% for t in tools or [] %}{{ '\n' + t | tojson }}{% endfor %}
{{ '<|im_end|>\n' }}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{{ '<|im_start|>assistant\n' }}{% if quiet %}{{ '<think>\n\n</think>\n' }}{% endif %}
{% generation %}{{ m.content.lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}{% if quiet %}{{ '<think>\n\n</think>\n' }}{% endif %}
{% endif %}
""")

# Thoughts are cut away, the generation prompt begins one, and no header follows the results of tools.
_DEEPSEEK = _joined(r"""
{{ bos_token }}{% set ns = namespace(tool=false) %}
{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}
{% elif m.role == 'assistant' and m.tool_calls %}
{{ '<｜Assistant｜>' if not ns.tool else '<｜tool▁outputs▁end｜>' }}{% set ns.tool = false %}
{% generation %}{{ m.content + '<｜tool▁calls▁begin｜>' }}
{% for c in m.tool_calls %}
{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments | tojson }}
{{ '\n```<｜tool▁call▁end｜>' }}
{% endfor %}
{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% endgeneration %}
{% elif m.role == 'assistant' %}
{{ '<｜Assistant｜>' if not ns.tool else '<｜tool▁outputs▁end｜>' }}{% set ns.tool = false %}
{% generation %}{{ m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endgeneration %}
{% elif m.role == 'tool' %}
{{ '<｜tool▁outputs▁begin｜>' if not ns.tool }}{% set ns.tool = true %}
{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{% endif %}
{% endfor %}
{% if ns.tool %}{{ '<｜tool▁outputs▁end｜>' }}
{% elif add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}
""")

# No token ends a turn: the next one's header does. Thoughts of earlier turns are emptied.
_GLM = _joined(r"""
{{ '[gMASK]<sop>' }}
{% if tools %}{{ '<|system|>\n# Tools' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{% endif %}
{% set ns = namespace(query=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>' }}{% generation %}
{{ '\n<think>' + (m.reasoning_content or '' if loop.index0 > ns.query else '') + '</think>' }}
{{ '\n' + m.content.strip() if m.content.strip() }}
{% for c in m.tool_calls or [] %}
{{ '\n<tool_call>' + c.function.name }}
{% for key, value in c.function.arguments | items %}
{{ '\n<arg_key>' + key + '</arg_key>\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>' }}
{% endfor %}
{{ '\n</tool_call>' }}
{% endfor %}
{% endgeneration %}
{% elif m.role == 'tool' %}
{{ '<|observation|>' if messages[loop.index0 - 1].role != 'tool' }}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% else %}{{ '<|' + m.role + '|>\n' + m.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
""")

# Channels: a thought is a message of its own, dropped once an answer follows; the last answer ends otherwise.
_HARMONY = _joined(r"""
{{ '<|start|>system<|message|>Today is ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{% set ns = namespace(name='') %}
{% if tools or messages[0].role == 'system' %}
{{ '<|start|>developer<|message|>' }}{{ messages[0].content if messages[0].role == 'system' }}
{% for t in tools or [] %}
{{ '\n// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: {' }}
{% for key, value in t.function.parameters.properties | items %}{{ key + ': ' + value.type + ', ' }}{% endfor %}
{{ '}) => any;' }}
{% endfor %}
{{ '<|end|>' }}
{% endif %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{% elif m.role == 'assistant' and m.tool_calls %}
{% if m.tool_calls | length > 1 or m.content %}{{ raise_exception('one call, and nothing beside it') }}{% endif %}
{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}
{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | rejectattr('tool_calls') | list %}
{{ '<|start|>assistant' }}{% generation %}
{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' if m.thinking and not later }}
{{ ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}
{% endgeneration %}
{% elif m.role == 'assistant' %}
{{ '<|start|>assistant' }}{% generation %}
{% if m.thinking and loop.last and not add_generation_prompt %}
{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}
{% endif %}
{{ '<|channel|>final<|message|>' + m.content }}
{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endgeneration %}
{% elif m.role == 'tool' %}
{{ '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
""")

# A control token for each role.
_COMMAND_R = _joined(r"""
{{ bos_token }}
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% generation %}
{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}
{% elif m.role in ('system', 'user') %}
{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
""")

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|endoftext|>")
_TURN = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
_DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
         "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
         "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
         "<｜tool▁output▁end｜>")  # fmt: skip
_CHANNELS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>")
_COMMAND = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>")  # fmt: skip

FAMILIES = {
    "llama3": Family(_LLAMA3, _LLAMA, _LLAMA[0], "<|eot_id|>"),
    "qwen25": Family(_QWEN25, _IM, None, "<|im_end|>"),
    "qwen3": Family(_QWEN3, _IM, None, "<|im_end|>"),
    "mistral": Family(_MISTRAL, _INST, "<s>", "</s>"),
    "gemma2": Family(_GEMMA2, _TURN, "<bos>", "<eos>"),
    "gemma3": Family(_GEMMA3, _TURN, "<bos>", "<eos>"),
    "phi3": Family(_PHI3, _PHI, None, "<|endoftext|>"),
    "phi4": Family(_PHI4, (*_IM, "<|im_sep|>"), None, "<|endoftext|>"),
    "phi4mini": Family(_PHI4_MINI, _PHI, None, "<|endoftext|>"),
    "smollm2": Family(_SMOLLM2, _IM, None, "<|im_end|>"),
    "smollm3": Family(_SMOLLM3, _IM, None, "<|im_end|>"),
    "deepseek": Family(_DEEPSEEK, _DEEP, _DEEP[0], _DEEP[1]),
    "glm": Family(_GLM, ("[gMASK]", "<sop>", "<|observation|>", *_PHI), None, "<|endoftext|>"),
    "harmony": Family(_HARMONY, _CHANNELS, None, "<|return|>"),
    "command_r": Family(_COMMAND_R, _COMMAND, _COMMAND[0], "<|END_OF_TURN_TOKEN|>"),
}
