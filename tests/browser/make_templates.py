"""Makes workflows/*.json, their API twins and pictures, in the real frontend.

    python -m tests.browser.make_templates [name ...] [--without-pictures]

The picture of the README, docs/quickstart.jpg, is taken with that of "1 Quickstart".

Needs a ComfyUI checkout and Chromium, as the tests do. Templates are written down here, as nodes in columns, because
a graph that is laid out by hand cannot be reviewed as text.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from io import BytesIO
from pathlib import Path

import tomllib
from PIL import Image

from tests.browser.frontend import Frontend, open_frontend
from tests.browser.stock_templates import BLUEPRINTS, STOCK
from tests.browser.templates import QUICKSTART, TEMPLATES, Template
from tests.browser.thumbnails import plan_card, result_card
from tests.comfyui.checkouts import checkouts
from tests.comfyui.server import Server

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / "workflows"
NOTES = ("MarkdownNote", "Note")
# Title of a template's picture, and what it says; of one that runs here, the label of the run beside the full one.
HALF = "computes half of the steps"
SHOWN = 4  # images of a run in a picture
CARDS = {
    "1 Quickstart": ("Quickstart", "Q&C"),
    "2 Flux.1 dev": ("Flux.1 dev", HALF),
    "3 Qwen-Image": ("Qwen-Image", HALF),
    "4 Z-Image": ("Z-Image", HALF),
    "5 SDXL": ("SDXL", HALF),
    "6 Wan 2.2, two experts": ("Wan 2.2", "two experts, each cached"),
    "7 LTX-Video": ("LTX-Video", HALF),
    "8 Quantize your model": ("Quantize", "quantized"),
    "9 Quantize Wan 2.1": ("Quantize Wan 2.1", "calibrated, saved with ModelSave"),
    "Paper, DiT-XL 256": ("DiT-XL/2 256", "cached, quantized, compensated"),
    "Paper, ablation": ("Ablation", "Q&C, all parts"),
}

# Nodes that show a picture or words while they work need room for them. Converting to a subgraph breaks wires to inputs
# that grow with what is wired, a moment later, and promotes some widgets by itself, under names such as text_1.
BUILD = """async ({columns, nodes, groups, subgraphs, gap}) => {
  const ROOM = {
    QandC_ApplyCache: 70, QandC_TAPCalibrate: 290, QandC_Quantize: 290, QandC_VarianceCompensate: 290,
    QandC_Sample: 230,
  };
  const wait = ms => new Promise(r => setTimeout(r, ms));
  const made = {};
  const fit = (node, [width, height]) => {
    const least = node.computeSize();
    node.setSize([Math.max(least[0], width), Math.max(least[1] + (ROOM[node.type] ?? 0), height)]);
  };
  const besideSource = (key, placed) => {
    const source = Object.values(nodes[key].inputs ?? {}).map(([from]) => from).find(from => placed.has(from));
    return source ? made[source].pos[1] - 40 : 0;
  };
  const layOut = (columns, gap, size, down, beside = false) => {
    const placed = new Set();
    let x = 0;
    for (const column of columns) {
      let y = 0, width = 0;
      for (const key of column) {
        fit(made[key], size(key));
        if (beside) y = Math.max(y, besideSource(key, placed));
        y += down(key) + (column[column.indexOf(key) - 1]?.startsWith('note') ? 40 : 0);  // for the title of a group
        made[key].pos = [x, y + 40];
        y += made[key].size[1] + 100;  // Nodes 2.0 draws a title and a foot beyond this
        width = Math.max(width, made[key].size[0]);
      }
      column.forEach(key => placed.add(key));
      x += width + gap;
    }
  };
  app.graph.clear();
  for (const [key, spec] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(spec.type);
    if (spec.title) node.title = spec.title;
    app.graph.add(node);
    made[key] = node;
    for (const [name, value] of Object.entries(spec.widgets ?? {})) {
      const widget = name ? node.widgets.find(w => w.name === name) : node.widgets[0];
      if (!widget) throw new Error(`${spec.type} has no widget ${name}`);
      widget.value = value;
      widget.callback?.(value);
    }
    const control = node.widgets?.find(w => w.name === 'control_after_generate');
    if (control) control.value = 'fixed';
  }
  await wait(300);
  const slotOf = (key, input) => {
    const at = made[key].inputs.findIndex(i => i.name === input);
    if (at < 0) throw new Error(`${key} has no input ${input}: ${made[key].inputs.map(i => i.name)}`);
    return at;
  };
  for (const [key, spec] of Object.entries(nodes)) {
    for (const [input, [from, slot]] of Object.entries(spec.inputs ?? {})) {
      made[from].connect(slot, made[key], slotOf(key, input));
      await wait(30);
    }
  }
  await wait(300);
  for (const subgraph of subgraphs) {
    for (const key of subgraph.members) made[key].properties.key = key;
    layOut(subgraph.columns, 70, () => [300, 0], () => 0, true);
    const converted = app.graph.convertToSubgraph(new Set(subgraph.members.map(key => made[key])));
    const outer = made[subgraph.key] = converted.node, inside = converted.subgraph;
    const innerOf = key => inside._nodes.find(n => n.properties.key === key);
    const linksOf = slot => slot.linkIds.map(id => inside.getLink(id)).filter(Boolean);
    const targets = input => linksOf(input).map(link => inside.getNodeById(link.target_id).inputs[link.target_slot]);
    nodes[subgraph.key] = {type: 'subgraph', size: subgraph.size, down: subgraph.down};
    inside.name = outer.title = subgraph.title;
    for (const input of inside.inputs.filter(input => !targets(input).some(slot => !slot.widget)))
      inside.removeInput(input);
    for (const {keys, name, shown} of subgraph.promoted) {
      const slots = keys.map(key => [innerOf(key).inputs.find(i => i.widget?.name === name), innerOf(key)]);
      const input = inside.addInput(shown, slots[0][0].type);
      for (const [slot, node] of slots) input.connect(slot, node);
    }
    await wait(1500);
    for (const [key, spec] of Object.entries(nodes)) {
      if (subgraph.members.includes(key) || !made[key]?.graph) continue;
      for (const [input, [from, slot]] of Object.entries(spec.inputs ?? {})) {
        if (!subgraph.members.includes(from)) continue;
        const inner = innerOf(from);
        let output = inside.outputs.findIndex(
          o => linksOf(o).some(l => l.origin_id === inner.id && l.origin_slot === slot));
        if (output < 0) {
          inside.addOutput(inner.outputs[slot].name, inner.outputs[slot].type).connect(inner.outputs[slot], inner);
          output = inside.outputs.length - 1;
        }
        const at = slotOf(key, input);
        const link = app.graph.getLink?.(made[key].inputs[at].link) ?? app.graph.links.get(made[key].inputs[at].link);
        if (link?.origin_id === outer.id && link.origin_slot === output) continue;
        outer.connect(output, made[key], at);
        await wait(300);
      }
    }
    // Of several models and results, model_1 and report_1 say nothing.
    for (const input of inside.inputs) {
      const shown = subgraph.inputs[inside.getNodeById(linksOf(input)[0].target_id).properties.key];
      if (shown && /^model/.test(input.name)) inside.renameInput(input, shown);
    }
    for (const output of inside.outputs) {
      const shown = subgraph.outputs[inside.getNodeById(linksOf(output)[0].origin_id).properties.key];
      if (shown) inside.renameOutput(output, shown);
    }
    // The frontend places the ends for the wires that it found, before others were added.
    const left = Math.min(...inside._nodes.map(n => n.pos[0]));
    const right = Math.max(...inside._nodes.map(n => n.pos[0] + n.size[0]));
    const top = Math.min(...inside._nodes.map(n => n.pos[1]));
    for (const end of [inside.inputNode, inside.outputNode]) end.arrange();
    inside.inputNode.pos = [left - 90 - inside.inputNode.size[0], top];
    inside.outputNode.pos = [right + 90, top];
    for (const node of inside._nodes) delete node.properties.key;
    if (subgraph.alone) for (const node of app.graph._nodes.filter(n => n !== outer)) app.graph.remove(node);
    await wait(300);
  }
  // What converting broke and was wired anew above is still in the list.
  for (const [id, link] of [...app.graph.links]) {
    const [from, to] = [link.origin_id, link.target_id].map(id => app.graph.getNodeById(id));
    if (to?.inputs[link.target_slot]?.link === id) continue;
    for (const output of from?.outputs ?? []) output.links = output.links?.filter(other => other !== id) ?? null;
    app.graph.links.delete(id);
  }
  layOut(columns, gap, key => nodes[key].size ?? [300, 0], key => nodes[key].down ?? 0);
  for (const {title, color, members} of groups) {
    const boxes = members.map(key => made[key]).map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]);
    const left = Math.min(...boxes.map(b => b[0])) - 20, top = Math.min(...boxes.map(b => b[1])) - 55;
    const right = Math.max(...boxes.map(b => b[0] + b[2])) + 20, bottom = Math.max(...boxes.map(b => b[1] + b[3])) + 45;
    const group = new LiteGraph.LGraphGroup(title);
    group.pos = [left, top];
    group.size = [right - left, bottom - top];
    group.color = color;
    app.graph.add(group);
  }
  app.graph.setDirtyCanvas(true, true);
}"""


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# Where the frontend brings a template that is opened from its dialog, in a browser at 1920 x 1080 without its bars.
WINDOW, FILLED, MARGIN = (1920, 950), 0.75, 10


def view(boxes: list[tuple[float, float, float, float]]) -> dict:
    """The whole graph in view; `boxes` are left, top, width and height of every node."""
    left, top = (min(box[axis] for box in boxes) - MARGIN for axis in (0, 1))
    width, height = (
        max(box[axis] + box[axis + 2] for box in boxes) + MARGIN - start for axis, start in ((0, left), (1, top))
    )
    scale = min(FILLED * WINDOW[0] / width, FILLED * WINDOW[1] / height, 1.0)
    offset = [WINDOW[0] / scale / 2 - left - width / 2, WINDOW[1] / scale / 2 - top - height / 2]
    return {"scale": round(scale, 3), "offset": [round(pixels) for pixels in offset]}


def finished(workflow: dict, template: Template) -> dict:
    """The workflow with what tells a frontend which pack and which model files it needs."""
    inner = (workflow.get("definitions") or {}).get("subgraphs") or []
    for node in [node for graph in (workflow, *inner) for node in graph["nodes"]]:
        properties = node.setdefault("properties", {})
        if node["type"].startswith("QandC_"):
            properties |= {"cnr_id": "qandc", "ver": version(), "Node name for S&R": node["type"]}
        elif node["type"] not in (*NOTES, *(graph["id"] for graph in inner)):
            properties |= {"cnr_id": "comfy-core", "ver": "0.18.1", "Node name for S&R": node["type"]}
        files = [model for model in template.models.values() if model["name"] in (node.get("widgets_values") or [])]
        if files:
            properties["models"] = files
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    workflow["extra"] = {"ds": view([(x, y - 30, w, h + 30) for x, y, w, h in boxes])}
    return named(workflow, template)


def named(workflow: dict, template: Template) -> dict:
    """The frontend gives a new subgraph a random id, which would change with every run of this program."""
    text = json.dumps(workflow)
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
    for more, graph in zip(["", *(f"/{i}" for i in range(1, len(subgraphs)))], subgraphs):
        text = text.replace(graph["id"], str(uuid.uuid5(uuid.NAMESPACE_URL, f"qandc/{template.name}{more}")))
    return json.loads(text)


def make(frontend: Frontend, template: Template) -> None:
    frontend.page.evaluate(BUILD, template.spec())
    workflow = finished(frontend.serialize(), template)
    if template in BLUEPRINTS:
        return write(ROOT / "subgraphs" / f"{template.name}.json", workflow)
    write(WORKFLOWS / f"{template.name}.json", workflow)
    frontend.load(workflow, template.name)
    write(WORKFLOWS / "api" / f"{template.name}.json", frontend.prompt())


def picture(server: Server, template: Template) -> Image.Image:
    """What the template browser shows of a template: what it made, or what it plans."""
    title, says = CARDS[template.name]
    if not template.runs_here:
        return plan_card(template, title, says)
    prompt = json.loads((WORKFLOWS / "api" / f"{template.name}.json").read_text(encoding="utf-8"))
    samples = {key: node["inputs"]["label"] for key, node in prompt.items() if node["class_type"] == "QandC_Sample"}
    shown = [key for key in samples if samples[key] in ("full precision", says)]
    for key, node in list(prompt.items()):
        if node["class_type"] == "VAEDecode" and node["inputs"]["samples"][0] in shown:
            prompt[f"images of {node['inputs']['samples'][0]}"] = {
                "class_type": "SaveImage", "inputs": {"images": [key, 0], "filename_prefix": "card"}
            }  # fmt: skip
        if node["class_type"] in ("QandC_Compare", "ModelSave"):
            del prompt[key]  # else all runs are sampled, some of them again
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = SHOWN
    run = server.succeed(prompt)
    images = {key: [Image.open(BytesIO(png)) for png in server.saved(run, f"images of {key}")] for key in shown}
    return result_card(title, [(samples[key], images[key]) for key in shown])


def show(frontend: Frontend, template: Template) -> None:
    """The graph after its run, for the README."""
    frontend.load(json.loads((WORKFLOWS / f"{template.name}.json").read_text(encoding="utf-8")), template.name)
    for seed in (0, 1):  # the first run after loading pays for set-up
        frontend.set_widgets({"seed": seed})
        frontend.run(timeout=1200)
    frontend.screenshot(ROOT / "docs" / "quickstart.jpg", frontend.show_all())


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    pictures = "--without-pictures" not in sys.argv
    chosen = [t for t in (*TEMPLATES, *STOCK, *BLUEPRINTS) if not names or t.name in names]
    with tempfile.TemporaryDirectory() as base, Server(checkouts()[0], Path(base)) as server:
        for template in chosen:
            for folder, name in template.files():
                path = Path(base, "models", folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()  # so that the choice is there; these templates are drawn, not run
            with open_frontend(server.address) as frontend:
                make(frontend, template)
            if template not in BLUEPRINTS and pictures:
                picture(server, template).save(WORKFLOWS / f"{template.name}.jpg", quality=90)
            if template is QUICKSTART and pictures:
                with open_frontend(server.address) as frontend:
                    show(frontend, template)
            print(template.name)  # noqa: T201


if __name__ == "__main__":
    main()
