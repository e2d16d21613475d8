//! Redacts passwords from the texts of drivers, servers and programs.

/// The replacement for a password.
pub(crate) const MASK: &str = "***";

/// Redacts the passwords of a URL. The names in the URL stay readable.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Redactor {
    passwords: Vec<String>,
    names: Vec<String>,
}

impl Redactor {
    pub(crate) fn new(passwords: impl IntoIterator<Item = String>, names: impl IntoIterator<Item = String>) -> Self {
        let passwords = passwords.into_iter().filter(|password| !password.is_empty());
        Self { passwords: passwords.collect(), names: names.into_iter().collect() }
    }

    /// Replaces each password in `text` by [`MASK`]. A password is replaced if it is in the position of a password
    /// (`user:password@host`, `password='..'`), or if it is a whole word that is neither a common word nor part of a
    /// name in the URL.
    pub(crate) fn redact(&self, text: &str) -> String {
        let passwords: Vec<Password> = self.passwords.iter().map(|password| Password::new(password)).collect();
        self.redact_words(&passwords, &self.redact_lists(&passwords, text))
    }

    /// Replaces lists of numbers, as which `Debug` shows bytes, by redacted text if they contain a password.
    fn redact_lists(&self, passwords: &[Password], text: &str) -> String {
        let redacted = |part: &str| {
            let (before, list) = part.rsplit_once('[')?;
            let list = list.trim_end_matches(|c: char| c == ']' || c == ',' || c.is_whitespace());
            let numbers = list.split(',').map(|number| number.trim().parse().ok());
            let shown = String::from_utf8_lossy(&numbers.collect::<Option<Vec<u8>>>()?).into_owned();
            let redacted = self.redact_words(passwords, &shown);
            (redacted != shown).then(|| format!("{before}[{redacted}]"))
        };
        text.split_inclusive(']').map(|part| redacted(part).unwrap_or_else(|| part.to_owned())).collect()
    }

    fn redact_words(&self, passwords: &[Password], text: &str) -> String {
        let mut redacted = String::with_capacity(text.len());
        let mut position = 0;
        while let Some(c) = text[position..].chars().next() {
            if let Some(end) = self.longest_match(passwords, text, position) {
                redacted.push_str(MASK);
                position = end;
            } else {
                redacted.push(c);
                position += c.len_utf8();
            }
        }
        redacted
    }

    /// The end of the longest password that begins at `start` and must be redacted.
    fn longest_match(&self, passwords: &[Password], text: &str, start: usize) -> Option<usize> {
        let (before, rest) = text.split_at(start);
        let must_redact = |password: &Password, length: usize| {
            let (found, after) = rest.split_at(length);
            is_password_position(before, found, after)
                || !password.is_common
                    && !splits_word(before, found)
                    && !splits_word(found, after)
                    && !self.is_in_name(text, start, start + length)
        };
        let matches = passwords.iter().flat_map(|password| {
            password.lengths_in(rest).into_iter().filter(move |&length| must_redact(password, length))
        });
        // A quote after the password ends the quotation. It does not belong to an escape sequence of the password.
        let quote = before.chars().next_back().filter(|c| ['\'', '"', '`'].contains(c));
        let keeps_quote = |length: usize| quote.is_some_and(|quote| rest[length..].starts_with(quote));
        matches.max_by_key(|&length| (keeps_quote(length), length)).map(|length| start + length)
    }

    fn is_in_name(&self, text: &str, start: usize, end: usize) -> bool {
        let mut names = self.names.iter().flat_map(|name| text.match_indices(name.as_str()));
        names.any(|(index, name)| index <= start && end <= index + name.len())
    }
}

/// A password with its spellings. It exists only during one redaction, because the spellings take much more memory than
/// the password.
struct Password {
    /// All spellings of each character.
    spellings: Vec<Vec<String>>,
    /// The password is so short or so common that it occurs in texts by chance.
    is_common: bool,
}

impl Password {
    fn new(password: &str) -> Self {
        Self { spellings: password.chars().map(spellings).collect(), is_common: is_common(password) }
    }

    /// The lengths of all spellings of the password at the beginning of `text`.
    fn lengths_in(&self, text: &str) -> Vec<usize> {
        self.spellings.iter().fold(vec![0], |lengths, spellings| {
            let mut longer = Vec::new();
            for spelling in spellings {
                let matching = lengths.iter().filter(|length| starts_with(&text[**length..], spelling));
                longer.extend(matching.map(|length| length + spelling.len()));
            }
            longer.sort_unstable();
            longer.dedup();
            longer
        })
    }
}

fn is_common(password: &str) -> bool {
    const SHORT: usize = 3;
    const WORDS: &str = "3306 5432 access authentication connect connection database denied error failed fatal host \
                         localhost mariadb mysql mysqld password pgsql port postgres postgresql refused role root \
                         server socket sqlite timeout user";
    password.chars().count() <= SHORT || WORDS.split(' ').any(|word| password.eq_ignore_ascii_case(word))
}

/// The spellings of a character in URLs, libpq's keyword form, SQL and `Debug`. `Debug` doubles the backslashes of the
/// other spellings.
fn spellings(c: char) -> Vec<String> {
    let in_hex = |prefix: &str| c.to_string().bytes().map(|byte| format!("{prefix}{byte:02x}")).collect::<String>();
    let escaped = (0..4).map(|backslashes| "\\".repeat(backslashes) + &c.to_string());
    let doubled = ['\'', '"', '`'].contains(&c).then(|| format!("{c}{c}"));
    escaped.chain(doubled).chain([c.escape_default().to_string(), in_hex("%"), in_hex("\\x")]).collect()
}

fn starts_with(text: &str, spelling: &str) -> bool {
    let is_hex = spelling.len() > 2 && (spelling.starts_with('%') || spelling.starts_with("\\x"));
    let start = text.get(..spelling.len());
    start.is_some_and(|start| start == spelling || is_hex && start.eq_ignore_ascii_case(spelling))
}

fn is_password_position(before: &str, found: &str, after: &str) -> bool {
    if before.ends_with(':') && after.starts_with('@') {
        return true;
    }
    let word = before.trim_end_matches(|c: char| c.is_whitespace() || "=:('\"`\\>".contains(c));
    let is_assigned = !before[word.len()..].trim().is_empty();
    let word = word.to_ascii_lowercase();
    is_assigned
        && ["password", "passwd", "pwd", " by"].iter().any(|name| word.ends_with(name))
        && !splits_word(found, after)
}

/// Whether `left` ends in the middle of a word that goes on in `right`.
fn splits_word(left: &str, right: &str) -> bool {
    let is_word_char = |c: char| c.is_alphanumeric() || c == '_';
    let tail = |length: usize| left.len().checked_sub(length).and_then(|start| left.get(start..)).unwrap_or_default();
    let is_escape = tail(3).starts_with('%') || tail(4).starts_with("\\x") || tail(2).starts_with('\\');
    left.ends_with(is_word_char) && !is_escape && right.starts_with(is_word_char)
}

/// Whether the value of the parameter is known not to be a password. An unknown parameter may be a misspelt `password`.
pub(crate) fn is_harmless(name: &str) -> bool {
    const BEGINNINGS: &str = "keepalives gss krb load_balance require ssl_ sslc sslk sslmode ssln sslr ssls";
    const NAMES: &str = "host hostaddr port dbname user passfile channel_binding connect_timeout client_encoding \
                         options application_name fallback_application_name tcp_user_timeout replication service \
                         servicefile min_protocol_version max_protocol_version target_session_attrs unix_socket \
                         mode cache psow nolock immutable vfs modeof";
    NAMES.split(' ').any(|known| name == known) || BEGINNINGS.split(' ').any(|beginning| name.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redact(password: &str, text: &str) -> String {
        Redactor::new([password.to_owned()], ["app", "db.example", "/srv/hunter2/shop"].map(str::to_owned)).redact(text)
    }

    #[test]
    fn redactor_finds_every_spelling() {
        let cases = [
            ("hunter2", "no hunter2, no hunt%65r2, no %68UNTER2", "no ***, no ***, no %68UNTER2"),
            ("s/p:w@1", "s/p:w@1 s%2Fp%3Aw%401 s%2fp%3aw%401", "*** *** ***"),
            (
                "pässwort",
                "'pässwort' 'p%C3%A4sswort' b\"p\\xc3\\xa4sswort\" p\\u{e4}sswort",
                "'***' '***' b\"***\" ***",
            ),
            ("it's \\ok", r"'it\'s \\ok' 'it''s \ok' it\\'s \\\\ok", "'***' '***' ***"),
            ("say \"hi\"", r#""say \"hi\"" "say ""hi""" say "hi""#, r#""***" "***" ***"#),
            ("tab\tend", "'tab\tend' \"tab\\tend\" tab%09end", "'***' \"***\" ***"),
            (
                "hunter2",
                "[104, 117, 110] NulError(8, [47, 104, 117, 110, 116, 101, 114, 50])",
                "[104, 117, 110] NulError(8, [/***])",
            ),
            (
                "hun/er2",
                "[\n    104,\n    117,\n    110,\n    37,\n    50,\n    70,\n    101,\n    114,\n    50,\n]",
                "[***]",
            ),
            ("a\\'b", r"password='a\\\'b'", "password='***'"),
            ("ab\\'", r"password='ab\\\'' or 'ab\'''", "password='***' or '***'"),
            ("", "nothing to redact", "nothing to redact"),
        ];
        for (password, text, redacted) in cases {
            assert_eq!(redact(password, text), redacted, "{password}");
        }
    }

    #[test]
    fn redactor_respects_word_boundaries() {
        let cases = [
            ("hunter2", "hunter2x xhunter2 hunter2_x hunter22 hunt", "hunter2x xhunter2 hunter2_x hunter22 hunt"),
            ("hunter2", "(hunter2) hunter2/hunter2, %3Ahunter2%40 \\nhunter2\\n", "(***) ***/***, %3A***%40 \\n***\\n"),
            // Punctuation at the beginning or the end of a password is always a word boundary.
            ("!hunter#", "x!hunter#x %21hunter%23x !!hunter##", "x***x ***x !***#"),
            ("----", "a-----b", "a***-b"),
            ("hunter2", "/srv/hunter2/shop hunter2/shop", "/srv/hunter2/shop ***/shop"),
        ];
        for (password, text, redacted) in cases {
            assert_eq!(redact(password, text), redacted, "{password}");
        }
    }

    #[test]
    fn redactor_redacts_common_passwords_only_in_password_positions() {
        for password in ["a", "sql", "password", "Postgres", "localhost", "5432", "app", "db.example"] {
            let text = |shown: &str| {
                format!(
                    "mysql://app:{shown}@db.example?password={shown}&x=y, host=x password = '{shown}' ALTER ROLE app \
                     PASSWORD '{shown}' SET PASSWORD = PASSWORD('{shown}') IDENTIFIED BY '{shown}', \"password\": \"{shown}\""
                )
            };
            assert_eq!(redact(password, &text(password)), text(MASK), "{password}");
            let list = format!("{:?}", format!("//:{password}@h").as_bytes());
            assert_eq!(redact(password, &list), "[//:***@h]", "{password}");
            let sentence =
                format!("{password} failed: \"{password}\" or {password}, password of \"{password}\" refused");
            assert_eq!(redact(password, &sentence), sentence);
        }
    }
}
