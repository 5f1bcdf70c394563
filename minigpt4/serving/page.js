() => {
  // images dropped anywhere on the page are added to the box; over the box itself gradio takes them
  const hasFiles = event => [...event.dataTransfer.types].includes("Files")
  document.addEventListener("dragover", event => { if (hasFiles(event)) event.preventDefault() })
  document.addEventListener("drop", event => {
    const input = document.querySelector("#box input[type=file]")
    if (!hasFiles(event) || event.target.closest("#box")) return
    event.preventDefault()  // or the browser would leave the page and show the file
    const images = new DataTransfer()
    for (const file of event.dataTransfer.files) if (file.type.startsWith("image/")) images.items.add(file)
    if (!input || !images.files.length) return
    input.files = images.files
    input.dispatchEvent(new Event("change", {bubbles: true}))
  })

  // messages are HTML, of which the text should be copied
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard)
    navigator.clipboard.writeText = html => {
      const text = html.replace(/<li>\n?/g, "- ").replace(/<[^>]*>/g, "")
      return write(new DOMParser().parseFromString(`<pre>\n${text}`, "text/html").body.textContent.trim())
    }
  }
}
