//! Prints text on a page of limited width.

const WIDTH: usize = 100;

/// Prints `text` in lines that begin with `indent` blanks. Breaks lines only at blanks.
pub(crate) fn print(indent: usize, text: &str) {
    let mut line = " ".repeat(indent);
    let mut words = 0;
    for word in text.trim_end().split([' ', '\n']) {
        if words > 0 && line.len() + word.len() >= WIDTH {
            println!("{line}");
            line.truncate(indent);
            words = 0;
        }
        if words > 0 {
            line.push(' ');
        }
        line.push_str(word);
        words += 1;
    }
    println!("{line}");
}
