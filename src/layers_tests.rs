//! Dependencies point in one direction.

use std::fs;
use std::path::Path;

/// The modules of the crate, lowest layer first. A module uses its own layer and the layers above it in this list.
const LAYERS: [&[&str]; 12] = [
    &["kind", "panic", "percent", "process", "redact", "settings", "sync", "wording"],
    &["error"],
    &["behind", "config", "sqlite_uri", "url"],
    &["connection", "dialect", "recorder"],
    &["unit_of_work"],
    &["pool"],
    &["app_core"],
    &["session"],
    &["app", "app_hooks", "context", "dispose", "migrations", "pooled_connection"],
    &["database", "registry"],
    &["admin"],
    &["testing"],
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The lines of `text`, code of the module `module`, that name a module of a higher layer.
fn forbidden_lines<'t>(module: &str, text: &'t str) -> Vec<&'t str> {
    let own = layer(module).unwrap_or_else(|| panic!("the module `{module}` is in no layer"));
    let code = |line: &&str| !line.trim_start().starts_with("//");
    let is_higher = |path: &str| {
        let name = path.split(|c: char| !c.is_alphanumeric() && c != '_').next();
        name.and_then(layer).is_some_and(|other| other > own)
    };
    text.lines().filter(code).filter(|line| line.split("crate::").skip(1).any(is_higher)).collect()
}

/// Every file of the library, with its path from `src`.
fn files(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("the sources are there") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
            let name = path.strip_prefix(root).expect("below src").to_string_lossy().replace('\\', "/");
            found.push((name, fs::read_to_string(&path).expect("a text")));
        }
    }
}

/// The code of a file without its items for tests, which may use the whole crate.
fn without_tests(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test") {
            // The item ends with a semicolon or with a brace in the first column.
            lines.by_ref().find(|line| !line.starts_with(' ') && line.ends_with([';', '}']));
        } else {
            code.push_str(line);
            code.push('\n');
        }
    }
    code
}

#[test]
fn no_module_uses_a_higher_layer() {
    let mut all = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    let mut wrong = Vec::new();
    for (name, text) in &all {
        let is_test = name.ends_with("tests.rs");
        if name == "lib.rs" || is_test {
            continue;
        }
        let module = name.split('/').next().unwrap_or(name).trim_end_matches(".rs");
        wrong.extend(forbidden_lines(module, &without_tests(text)).iter().map(|line| format!("src/{name}: {line}")));
    }
    assert!(wrong.is_empty(), "imports from a higher layer:\n{}", wrong.join("\n"));
}

#[test]
fn forbidden_import_is_found() {
    assert_eq!(
        forbidden_lines("pool", "use crate::error::Error;\nuse crate::session::Session;\n// crate::app\n"),
        ["use crate::session::Session;"]
    );
    assert!(forbidden_lines("testing", "use crate::app::App;").is_empty());
}

#[test]
fn code_after_an_item_for_tests_is_checked() {
    let text = "#[cfg(all(test, unix))]\nmod some_tests;\nuse crate::a;\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\nuse crate::c;\n";
    assert_eq!(without_tests(text), "use crate::a;\nuse crate::c;\n");
}
