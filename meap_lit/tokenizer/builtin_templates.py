"""Chat templates that may be named instead of a tokenizer's own.

`chatml` and `llama3` know tools. Each template encloses what the assistant says and the token that closes it in
`{% generation %}`, and renders in transformers as it does here. A prompt, rendered with `add_generation_prompt`, is the
beginning of the conversation that answers it. `BOS` goes in front for a tokenizer that writes BOS before a text.
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

# llama.com, "Llama 3 model cards and prompt formats"; tools as in "JSON based tool calling" of Llama 3.1, where a
# message holds one call. Text before a call, and further calls, are lines of their own.
_LLAMA3 = """\
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if role == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim if message['content'] }}
            {%- for call in message['tool_calls'] or [] %}
                {%- set function = call['function'] if call['function'] is defined else call %}
                {{- '\\n' if message['content'] or not loop.first }}
                {{- '{"name": "' + function['name'] + '", "parameters": ' + function['arguments'] | tojson + '}' }}
            {%- endfor %}
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {%- if tools and role == 'user' and (loop.first or loop.previtem['role'] == 'system') %}
            {{- 'Given the following functions, please respond with a JSON for a function call ' }}
            {{- 'with its proper arguments that best answers the given prompt.\\n\\n' }}
            {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its ' }}
            {{- 'value}. Do not use variables.\\n\\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\\n\\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# github.com/openai/openai-python, chatml.md (v0.28); tools as in the template of Qwen2.5
_CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' }}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem['role'] != 'tool' }}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem['role'] != 'tool' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'] if message['content'] }}
            {%- for call in message['tool_calls'] or [] %}
                {%- set function = call['function'] if call['function'] is defined else call %}
                {{- '\\n' if message['content'] or not loop.first }}
                {{- '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
                {{- function['arguments'] | tojson + '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
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
