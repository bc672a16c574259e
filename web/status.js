// On the canvas ("classic") the words that a run leaves on a node get two lines, whatever they say. This gives those of
// this pack's nodes as many as they need, by making the node higher, and breaks them between words; Nodes 2.0 does so by
// itself.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

const WIDGET = '$$node-text-preview'
const SIZE = 12 // pixels of the font
const LINE = 16 // pixels, with its gap
const AROUND = 30 // above and below the lines
const ASIDE = 66 // of a node's width
const MOST = 14 // lines

const pen = document.createElement('canvas').getContext('2d')

function lines(paragraph, width) {
  let [count, used] = [1, 0]
  for (const word of paragraph.split(/(?<=\s)/)) {
    const needed = pen.measureText(word).width
    if (used && used + pen.measureText(word.trimEnd()).width > width) [count, used] = [count + 1, 0]
    count += Math.floor(needed / width) // a word that is longer than a line
    used = needed > width ? needed % width : used + needed
  }
  return count
}

function height(text, width) {
  pen.font = `${SIZE}px ${getComputedStyle(document.body).fontFamily}`
  const needed = text.split('\n').reduce((sum, paragraph) => sum + lines(paragraph, width - ASIDE), 0)
  return AROUND + LINE * Math.min(MOST, Math.max(2, needed))
}

const letters = (text) => text.replace(/\s+/g, '')

// The frontend breaks the text at any letter. Its element does not say which node it is of, but what is said there.
function breakBetweenWords(text) {
  for (const place of document.querySelectorAll('.dom-widget .break-all'))
    if (letters(place.textContent) === letters(text))
      Object.assign(place.style, { wordBreak: 'normal', overflowWrap: 'anywhere', minWidth: 0 })
}

function fit(node) {
  const widget = node.widgets?.find((found) => found.name === WIDGET)
  if (!widget?.options || !(node.subgraph || node.comfyClass?.startsWith('QandC_'))) return
  const text = String(widget.value ?? '')
  const needed = height(text, node.size[0])
  breakBetweenWords(text)
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
