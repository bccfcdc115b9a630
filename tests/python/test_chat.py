import json
from datetime import datetime

import pytest

from moerun import errors
from moerun.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello <you> & 'all'"}]


def rendered(source, messages=HELLO, **variables):
    return ChatTemplate(source, "test").render(messages, **variables)


def write_config(directory, **fields):
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def test_a_conversation_is_rendered_turn_by_turn():
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert rendered(CHATML, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello <you> & 'all'<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_generation_prompt_can_be_left_out():
    text = rendered(CHATML, add_generation_prompt=False)
    assert text.endswith("<|im_end|>\n")


def test_blocks_are_trimmed_as_hugging_face_trims_them():
    source = "  {% for message in messages %}\nx\n  {% endfor %}\ny"
    assert rendered(source) == "x\ny"


def test_loop_controls_are_understood():
    source = "{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"
    assert rendered(source) == "01"


def test_the_generation_tag_keeps_its_body():
    assert rendered("{% generation %}{{ 1 + 1 }}{% endgeneration %}!") == "2!"


def test_tojson_keeps_characters_as_they_are():
    assert rendered("{{ messages[0].content | tojson }}") == json.dumps(HELLO[0]["content"])
    assert rendered("{{ 'ü<' | tojson }}") == '"ü<"'
    assert rendered("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'


def test_the_date_is_there_for_templates_that_state_it():
    assert rendered("{{ strftime_now('%Y') }}") in {
        str(datetime.now().year),
        str(datetime.now().year - 1),
    }


def test_a_refusal_of_the_template_reaches_the_user():
    with pytest.raises(errors.InvalidArgumentError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_format_error(source):
    with pytest.raises(errors.FormatError, match="chat template of test"):
        rendered(source)


def test_a_syntax_error_names_the_file_and_the_line():
    with pytest.raises(errors.FormatError, match="here, line 2"):
        ChatTemplate("ok\n{% if %}", "here")


def test_a_model_without_a_template_has_none(tmp_path, tokenizer):
    assert ChatTemplate.from_directory(tmp_path) is None
    assert tokenizer.chat_template is None


def test_the_template_of_the_configuration_knows_the_special_tokens(tmp_path):
    write_config(
        tmp_path,
        chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}",
        bos_token="<s>",
        eos_token={"content": "</s>", "special": True},
        pad_token=None,
    )
    assert ChatTemplate.from_directory(tmp_path).render(HELLO) == "<s></s>"


def test_the_default_of_several_named_templates_is_taken(tmp_path):
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_config(tmp_path, chat_template=templates)
    assert ChatTemplate.from_directory(tmp_path).render(HELLO) == "yes"


def test_a_template_file_comes_before_the_configuration(tmp_path):
    write_config(tmp_path, chat_template="configuration", bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert ChatTemplate.from_directory(tmp_path).render(HELLO) == "<s>file"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not valid UTF-8"),
        (b'{"chat_template": 3}', "chat_template"),
        (b'{"chat_template": [{"name": "default"}]}', "chat_template"),
        (b'{"chat_template": [{"name": "rag", "template": ""}]}', "rag"),
        (b'{"chat_template": "{% for %}"}', "line 1"),
    ],
)
def test_a_bad_configuration_is_a_format_error_that_names_the_file(tmp_path, content, expected):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(content)
    with pytest.raises(errors.FormatError, match=expected) as caught:
        ChatTemplate.from_directory(tmp_path)
    assert str(path) in str(caught.value)
