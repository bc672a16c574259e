// ComfyUI lists a pack's templates as they lie on the disk. This sorts those of this pack, whose names begin with numbers.
import { api } from '../../scripts/api.js'

const pack = decodeURIComponent(new URL(import.meta.url).pathname.split('/extensions/')[1].split('/')[0])
const { getWorkflowTemplates } = api

if (typeof getWorkflowTemplates === 'function') {
  api.getWorkflowTemplates = async function () {
    const found = await getWorkflowTemplates.call(this)
    found[pack]?.sort?.((a, b) => a.localeCompare(b, 'en', { numeric: true }))
    return found
  }
}
