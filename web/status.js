// On the canvas ("classic") the words that a run leaves on a node get two lines, whatever they say. This gives those of
// this pack's nodes as many as they need, by making the node higher; Nodes 2.0 does so by itself.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

const WIDGET = '$$node-text-preview'
const FONT = '12px sans-serif'
const LINE = 16 // pixels, with its gap
const AROUND = 30 // above and below the lines
const ASIDE = 66 // of a node's width
const MOST = 14 // lines

const pen = document.createElement('canvas').getContext('2d')
pen.font = FONT

function height(text, width) {
  const lines = text.split('\n').map((line) => Math.max(1, Math.ceil(pen.measureText(line).width / (width - ASIDE))))
  return AROUND + LINE * Math.min(MOST, Math.max(2, lines.reduce((sum, count) => sum + count, 0)))
}

function fit(node) {
  const widget = node.widgets?.find((found) => found.name === WIDGET)
  if (!widget?.options || !(node.subgraph || node.comfyClass?.startsWith('QandC_'))) return
  const needed = height(String(widget.value ?? ''), node.size[0])
  widget.options.getMinHeight = () => needed
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
  node.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: 'qc.status',
  setup() {
    // after the frontend has given the node its widget
    const after = () => LiteGraph.vueNodesMode || app.canvas?.graph?._nodes.forEach(fit)
    api.addEventListener('progress_text', () => setTimeout(after, 100))
  }
})
