() => {
  const BOX = /\s*\{(\s*<-?\d+>){4}\s*\}/g
  const element = (name, parent, text = "") => {
    const made = parent.appendChild(document.createElement(name))
    made.textContent = text
    return made
  }

  // the image to draw on: the latest of the message, else of the chat
  const latestImage = (message, chat) => {
    const parts = (chat || []).flatMap(({role, content}) => role == "user" && Array.isArray(content) ? content : [])
    const files = [...parts.filter(part => part.type == "file").map(part => part.file), ...(message?.files || [])]
    return files.at(-1)?.url
  }

  // lets the user draw a box on `frame` with mouse, pen or finger; calls `changed` with [x0, y0, x1, y1] in hundredths
  const drawOn = (frame, changed) => {
    const rectangle = element("span", frame)
    let start = null
    const at = ({clientX, clientY}) => {
      const {x, y, width, height} = frame.getBoundingClientRect()
      return [(clientX - x) / width, (clientY - y) / height].map(share => Math.min(Math.max(share, 0), 1))
    }
    frame.onpointerdown = event => {
      event.preventDefault()
      frame.setPointerCapture(event.pointerId)
      start = at(event)
    }
    frame.onpointerup = frame.onpointercancel = () => { start = null }
    frame.onpointermove = event => {
      if (!start) return
      const end = at(event)
      const [left, top] = [0, 1].map(axis => Math.min(start[axis], end[axis]))
      const [right, bottom] = [0, 1].map(axis => Math.max(start[axis], end[axis]))
      const [width, height] = [right - left, bottom - top]
      for (const [name, share] of Object.entries({left, top, width, height})) rectangle.style[name] = `${100 * share}%`
      changed([left, top, right, bottom].map(share => Math.trunc(100 * share)))  // as training truncates
    }
  }

  window.boxes = {
    // puts the identifier of a task before the question, in place of an earlier one
    task: (message, name, question) => {
      const text = (message?.text || "").replace(/^\s*\[\w+\]\s*/, "")
      return {files: [], ...message, text: `[${name}] ${text || question}`}
    },

    // lets the user draw a box on the image; appends it to the question, in place of an earlier one
    draw: (message, chat) => new Promise(done => {
      const dialog = element("dialog", document.querySelector(".gradio-container"))
      dialog.id = "draw-box"
      const hint = element("p", dialog, "Draw a box with the mouse or a finger.")
      const frame = element("div", dialog), row = element("form", dialog)
      const image = element("img", frame), url = latestImage(message, chat)
      const said = element("code", row), cancel = element("button", row, "Cancel"), use = element("button", row, "Use it")
      let box = ""
      row.method = "dialog"
      use.value = "use"
      use.disabled = true
      image.draggable = false
      image.onerror = () => { hint.textContent = "The browser cannot show this image; write {<x0><y0><x1><y1>}." }
      if (url) image.src = url
      else hint.textContent = "Add an image first."
      drawOn(frame, ([left, top, right, bottom]) => {
        use.disabled = right <= left || bottom <= top
        said.textContent = box = `{<${left}><${top}><${right}><${bottom}>}`
      })
      dialog.onclose = () => {
        const text = `${(message?.text || "").replace(BOX, "").trimEnd()} ${box}`.trimStart()
        done(dialog.returnValue == "use" ? {files: [], ...message, text} : message)
        dialog.remove()
        setTimeout(() => document.querySelector("#box textarea")?.focus())
      }
      dialog.showModal()
    }),
  }
}
