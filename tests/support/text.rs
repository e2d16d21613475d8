use std::fmt::Write;
use std::hash::{BuildHasher, RandomState};

/// Percent-encodes everything that is not an unreserved character of a URL.
pub fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte.into());
        } else {
            write!(out, "%{byte:02X}").expect("a String takes everything");
        }
        out
    })
}

/// One word of a shell command, whatever it contains.
pub fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A number that no other test process draws.
pub fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}
