"""Chat templates that may be named instead of a tokenizer's own.

They know no tools. Each encloses what the assistant says and the token that closes it in `{% generation %}`, and
renders in transformers as it does here. A prompt, rendered with `add_generation_prompt`, is the beginning of the
conversation that answers it. `BOS` goes in front for a tokenizer that writes BOS before a text.
"""

BOS = "{{- bos_token }}\n"

# The prompt of github.com/tatsu-lab/stanford_alpaca (train.py). It knows a single turn; further ones repeat its layout.
_ALPACA = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {%- if loop.first %}
            {{- 'Below is an instruction that describes a task' }}
            {{- ', paired with an input that provides further context. ' if message['input'] else '. ' }}
            {{- 'Write a response that appropriately completes the request.\\n\\n' }}
        {%- elif loop.previtem['role'] == 'assistant' %}
            {{- '\\n\\n' }}
        {%- endif %}
        {{- '### Instruction:\\n' }}
        {{- message['instruction'] if message['instruction'] is defined else message['content'] }}
        {{- '\\n\\n### Input:\\n' + message['input'] if message['input'] }}
        {{- '\\n\\n### Response:' }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

# llama.com, "Llama 3 model cards and prompt formats"
_LLAMA3 = """\
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# github.com/openai/openai-python, chatml.md (v0.28)
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Mistral's version 3 (Mistral 7B Instruct v0.3; github.com/mistralai/mistral-common). The system message
# comes before the first user message, where it does not move as the conversation grows.
_MISTRAL = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- if not loop.first and loop.previtem['role'] == 'system' %}
            {{- loop.previtem['content'] + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}
            {{- ' ' + message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

NAMED = {"alpaca": _ALPACA, "llama3": _LLAMA3, "chatml": _CHATML, "mistral": _MISTRAL}
"""Jinja source of the templates that may be named instead of the tokenizer's own."""
