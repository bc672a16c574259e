"""The recorded node schemas against the sources and against everything written about the nodes."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
LOCALES = ("en", "zh")
NODES = sorted(CONTRACT)


def inputs(node):
    """(key in the locale files, name, options) of every input; those inside a dynamic combo have a key of two parts."""
    for section in ("required", "optional"):
        for name in CONTRACT[node]["input_order"].get(section, []):
            kind, options = CONTRACT[node]["input"][section][name]
            yield name, name, options
            for choice in options["options"] if kind == "COMFY_DYNAMICCOMBO_V3" else []:
                for inner in choice["inputs"].values():
                    yield from ((f"{name}_{inner_name}", inner_name, spec) for inner_name, (_, spec) in inner.items())


def grown_inputs(node):
    """Options of the inputs that an autogrow template repeats."""
    for section in CONTRACT[node]["input"].values():
        for name, (kind, *options) in section.items():
            if kind == "COMFY_AUTOGROW_V3":
                for inner in options[0]["template"]["input"].values():
                    yield from ((f"{name}.{inner_name}", spec) for inner_name, (_, spec) in inner.items())


def outputs(node):
    """(key in the locale files, name, tooltip) of every output."""
    return [
        (str(i), name, tooltip)
        for i, (name, tooltip) in enumerate(zip(CONTRACT[node]["output_name"], CONTRACT[node]["output_tooltips"]))
    ]


def declared_nodes():
    """node_id -> file of every schema in nodes/."""
    found = {}
    for path in (ROOT / "nodes").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                for keyword in call.keywords:
                    if keyword.arg == "node_id":
                        assert isinstance(keyword.value, ast.Constant), f"{path}:{call.lineno}: node_id is no constant"
                        assert keyword.value.value not in found, f"{keyword.value.value} is declared twice"
                        found[keyword.value.value] = path
    return found


def locale(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def help_source(node, language):
    """English is the page that the frontend falls back to in every other language."""
    docs = ROOT / "web" / "docs"
    path = docs / f"{node}.md" if language == "en" else docs / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def help_page(node, language="en"):
    """Names that are too long for the panel are written as HTML, with a place to break them."""
    page = help_source(node, language)
    return re.sub("</?code>", "`", page.replace("<wbr>", ""))


def test_contract_has_the_nodes_of_the_sources_each_in_its_own_file():
    declared = declared_nodes()
    assert set(declared) == set(CONTRACT)
    assert len(set(declared.values())) == len(declared)


def test_contract_holds_no_files_of_the_machine_it_was_recorded_on():
    recorded = json.dumps(CONTRACT)
    assert not re.search(r"\.(safetensors|sft|pt|pth|ckpt|bin)\b", recorded)
    assert CONTRACT["QandC_LoadDiT"]["input"]["required"]["model_name"][1]["options"] == ["built-in demo"]
    for node in ("QandC_TAPCalibrate", "QandC_VarianceCompensate"):
        assert CONTRACT[node]["input"]["required"]["file"][1]["options"] == ["new"]


def test_contract_is_written_with_sorted_keys():
    recorded = Path(__file__).with_name("object_info.json").read_text(encoding="utf-8")
    assert recorded == json.dumps(CONTRACT, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("node", NODES)
def test_node_is_described(node):
    schema = CONTRACT[node]
    assert schema["name"] == node
    assert schema["category"] == "Q&C"
    assert schema["display_name"].strip()
    assert schema["description"].strip()


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_has_a_tooltip(node):
    tooltips = {f"input {key}": options.get("tooltip") for key, _, options in inputs(node)}
    tooltips |= {f"input {key}": options.get("tooltip") for key, options in grown_inputs(node)}
    tooltips |= {f"output {key}": tooltip for key, _, tooltip in outputs(node)}
    assert not [key for key, tooltip in tooltips.items() if not (tooltip and tooltip.strip())]


@pytest.mark.parametrize("node", NODES)
def test_help_page_names_every_input_and_output(node):
    page = help_page(node)
    assert page.startswith(f"# {CONTRACT[node]['display_name']}\n")
    assert not [name for _, name, _ in inputs(node) if f"`{name}`" not in page]
    assert not [name for _, name, _ in outputs(node) if not re.search(rf"^- `{name}`: ", page, re.MULTILINE)]


@pytest.mark.parametrize("node", NODES)
def test_chinese_help_page_names_every_input_and_output(node):
    page = help_page(node, "zh")
    assert page.startswith(f"# {locale('zh')[node]['display_name']}\n")
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == [f"{node}/wiring.zh.svg"]
    assert not [name for _, name, _ in inputs(node) if f"`{name}`" not in page]
    assert not [
        name for _, name, _ in outputs(node) if not re.search(rf"^- `{name}`[\uff08\uff1a]", page, re.MULTILINE)
    ]
    assert len(re.findall(r"^## ", page, re.MULTILINE)) >= 5 and len(re.findall(r"[\u4e00-\u9fff]", page)) > 400


@pytest.mark.parametrize("node", NODES)
def test_chinese_help_page_calls_inputs_as_the_interface_does(node):
    page, entry = help_page(node, "zh"), locale("zh")[node]["inputs"]
    called = {key: re.search(rf"`{name}`\uff08(.*?)\uff09[\uff1a\u3001]", page) for key, name, _ in inputs(node)}
    assert len([found for found in called.values() if found]) > len(called) / 2
    assert not {key: found[1] for key, found in called.items() if found and found[1] != entry[key]["name"]}


@pytest.mark.parametrize("node", NODES)
def test_chinese_help_page_quotes_the_messages_of_the_english_one(node):
    english = re.split(r"^## Limits and messages$", help_page(node), flags=re.MULTILINE)[1].split("\n## ")[0]
    chinese = re.split(r"^## \u9650\u5236\u4e0e\u63d0\u793a$", help_page(node, "zh"), flags=re.MULTILINE)[1]
    quoted = {" ".join(text.split()) for text in re.findall(r'"([^"]+)"', english)}
    assert quoted == set(re.findall(r"\u201c([^\u201d]*[a-z] [^\u201d]*)\u201d", chinese.split("\n## ")[0]))


@pytest.mark.parametrize("language", LOCALES)
@pytest.mark.parametrize("node", NODES)
def test_help_page_fits_the_panel(node, language):
    # The panel can be 218 pixels wide: it cut the third column of tables off, and does not break code blocks.
    page = help_source(node, language)
    assert "\n|" not in page and "```" not in page
    assert not re.findall(r"`[\w./-]{21,}`", page, re.ASCII), "write <code>long_<wbr>name</code>, so that it can break"
    assert not re.search(r"\*[^*\n]*[\uff1a\u3002]\*(?=\w)", page), (
        "emphasis that ends in a full-width mark is not closed"
    )


@pytest.mark.parametrize("node", NODES)
def test_help_page_is_ascii_and_shows_the_wiring_first(node):
    page = help_page(node)
    assert page.isascii()
    # The frontend puts the folder web/docs, not that of the page, before a picture's path.
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == [f"{node}/wiring.svg"]
    assert page.splitlines()[2].startswith("![")


@pytest.mark.parametrize("language", LOCALES)
def test_locale_has_exactly_the_nodes(language):
    assert set(locale(language)) == set(CONTRACT)


@pytest.mark.parametrize("language", LOCALES)
@pytest.mark.parametrize("node", NODES)
def test_locale_names_every_input_and_output(node, language):
    entry = locale(language)[node]
    assert entry["display_name"].strip()
    assert entry["description"].strip()
    expected = {key for key, _, _ in inputs(node)}
    # The seed's second widget, which the frontend adds; it has a name and no tooltip in ComfyUI's own locales.
    added = {"control_after_generate"} if any(o.get("control_after_generate") for _, _, o in inputs(node)) else set()
    assert set(entry["inputs"]) == expected | added
    assert set(entry["outputs"]) == {key for key, _, _ in outputs(node)}
    for key, texts in {**entry["inputs"], **entry["outputs"]}.items():
        assert texts["name"].strip(), key
        assert key in added or texts["tooltip"].strip(), key


@pytest.mark.parametrize("language", LOCALES)
def test_locale_has_no_character_that_the_translator_interprets(language):
    # vue-i18n reads these as interpolation, linked messages and plurals.
    texts = json.dumps([list(walk(locale(language)))], ensure_ascii=False)
    assert not re.search(r"\{|\}|@|\|", texts)


def walk(value):
    for item in value.values() if isinstance(value, dict) else ():
        yield from walk(item)
    if isinstance(value, str):
        yield value


@pytest.mark.parametrize("node", NODES)
def test_english_locale_says_what_the_schema_says(node):
    entry = locale("en")[node]
    assert entry["display_name"] == CONTRACT[node]["display_name"]
    assert entry["description"] == CONTRACT[node]["description"]
    for key, name, options in inputs(node):
        assert entry["inputs"][key] == {"name": name, "tooltip": options["tooltip"]}
    for key, name, tooltip in outputs(node):
        assert entry["outputs"][key] == {"name": name, "tooltip": tooltip}


@pytest.mark.parametrize("node", NODES)
def test_chinese_locale_is_translated(node):
    entry = locale("zh")[node]
    texts = [entry["description"], *(t["tooltip"] for t in entry["inputs"].values() if "tooltip" in t)]
    texts += [texts["tooltip"] for texts in entry["outputs"].values()]
    assert not [text for text in texts if not re.search(r"[\u4e00-\u9fff]", text)]


def test_node_list_describes_every_node():
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {node: CONTRACT[node]["description"] for node in CONTRACT}
