// Nodes 2.0 folds advanced inputs away; nodes on the canvas ("classic") draw them open, as if nothing were advanced.
// This folds those of this pack's nodes there too: "Show Advanced" in the menu of a node opens them.
import { app } from '../../scripts/app.js'

const ROW = 24 // pixels of a widget, with its gap

const advanced = (node) => node.widgets?.filter((widget) => widget.options?.advanced) ?? []
const linked = (node, widget) => node.inputs?.some((slot) => slot.widget?.name === widget.name && slot.link != null)

function fold(nodeType) {
  const { isWidgetVisible, getLayoutWidgets, toggleAdvanced } = nodeType.prototype
  nodeType.prototype.isWidgetVisible = function (widget) {
    const wired = widget.advanced && !this.collapsed && linked(this, widget)
    return wired || isWidgetVisible.call(this, widget)
  }
  nodeType.prototype.getLayoutWidgets = function () {
    return getLayoutWidgets.call(this).filter((widget) => !widget.advanced || this.isWidgetVisible(widget))
  }
  nodeType.prototype.toggleAdvanced = function () {
    const [width, height] = this.size
    toggleAdvanced.call(this)
    const rows = advanced(this).filter((widget) => !linked(this, widget)).length
    this.setSize([width, height + (this.showAdvanced ? rows : -rows) * ROW])
  }
}

app.registerExtension({
  name: 'qc.advanced',
  beforeRegisterNodeDef(nodeType, nodeData) {
    const known = ['isWidgetVisible', 'getLayoutWidgets', 'toggleAdvanced']
    const folds = known.every((name) => typeof nodeType.prototype[name] === 'function')
    if (nodeData.name.startsWith('QandC_') && folds) fold(nodeType)
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith('QandC_')) return
    for (const widget of advanced(node)) widget.advanced = true
    if (!LiteGraph.vueNodesMode) node.setSize([node.size[0], node.computeSize()[1]])
  }
})
