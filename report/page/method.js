document.querySelectorAll('[data-copy]').forEach(button => {
  const word = button.textContent;
  button.addEventListener('click', async () => {
    const text = document.querySelector(button.dataset.copy).textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement('textarea');
      area.value = text;
      area.style.cssText = 'position:fixed;opacity:0';
      document.body.append(area);
      area.select();
      done = document.execCommand('copy');
      area.remove();
      button.focus();
    }
    document.getElementById('said').textContent = button.textContent = done ? 'Copied' : 'Select it and copy';
    setTimeout(() => { button.textContent = word; }, 1800);
  });
});
