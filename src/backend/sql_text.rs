//! Just enough reading of raw SQL to see a statement that ends a transaction behind Diesel's back.

/// The first words of a statement in `sql` that ends the transaction it is sent in.
///
/// `mysql` is for MySQL and MariaDB, whose data definition and maintenance commit by themselves, and which read strings and
/// comments their own way.
pub(crate) fn ending_word(sql: &str, mysql: bool) -> Option<String> {
    let mut rest = sql;
    // Inside of the body of a trigger or function, whose `END` ends no transaction.
    let mut in_body = false;
    loop {
        rest = skip_blank(rest, mysql);
        if rest.is_empty() {
            return None;
        }
        let after_this = after_statement(rest, mysql);
        let statement = &rest[..rest.len() - after_this.len()];
        let (first, after) = word(rest);
        let (second, after_second) = word(skip_blank(after, mysql));
        let (third, _) = word(skip_blank(after_second, mysql));
        let ends = match first.as_str() {
            "END" if in_body => {
                in_body = false;
                false
            }
            "COMMIT" | "END" | "ABORT" => true,
            "ROLLBACK" => !(second == "TO" || third == "TO"),
            "PREPARE" => second == "TRANSACTION",
            "BEGIN" => mysql,
            "START" | "STOP" => mysql,
            "CREATE" | "DROP" => mysql && second != "TEMPORARY",
            "ALTER" | "TRUNCATE" | "RENAME" | "GRANT" | "REVOKE" | "LOCK" | "UNLOCK" | "ANALYZE" | "OPTIMIZE"
            | "CHECK" | "REPAIR" | "FLUSH" | "RESET" | "CACHE" | "INSTALL" | "UNINSTALL" | "CHANGE" | "XA"
            | "BACKUP" | "SHUTDOWN" => mysql,
            "LOAD" => mysql && second == "INDEX",
            "SET" => mysql && (second == "PASSWORD" || statement.to_ascii_lowercase().contains("autocommit")),
            _ => false,
        };
        if ends {
            return Some(first);
        }
        in_body |= first == "CREATE" && has_word(statement, "BEGIN");
        rest = after_this;
    }
}

/// Whether `sql` may have a part that only MySQL or MariaDB can read: a prepared text, a procedure, the comments they execute,
/// and the prefix that sets a variable for one statement.
pub(crate) fn has_hidden_part(sql: &str) -> bool {
    let sql = sql.to_ascii_uppercase();
    ["EXECUTE", "CALL", "/*!", "/*M!", "SET STATEMENT"].iter().any(|sign| sql.contains(sign))
}

/// Whether a statement in `sql` begins a transaction.
pub(crate) fn begins(sql: &str, mysql: bool) -> bool {
    let mut rest = skip_blank(sql, mysql);
    while !rest.is_empty() {
        let (first, after) = word(rest);
        match first.as_str() {
            "BEGIN" | "SAVEPOINT" => return true,
            "START" if word(skip_blank(after, mysql)).0 == "TRANSACTION" => return true,
            _ => rest = skip_blank(after_statement(rest, mysql), mysql),
        }
    }
    false
}

pub(super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn word(text: &str) -> (String, &str) {
    let end = text.find(|c: char| !is_word(c)).unwrap_or(text.len());
    (text[..end].to_ascii_uppercase(), &text[end..])
}

fn has_word(text: &str, wanted: &str) -> bool {
    text.split(|c: char| !is_word(c)).any(|word| word.eq_ignore_ascii_case(wanted))
}

/// `text` without leading white space, semicolons and comments.
fn skip_blank(mut text: &str, mysql: bool) -> &str {
    loop {
        text = text.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        if let Some(rest) = after_comment(text, mysql) {
            text = rest;
        } else {
            return text;
        }
    }
}

/// What follows the comment that `text` starts with. What MySQL executes of a comment counts as not being in one.
pub(super) fn after_comment(text: &str, mysql: bool) -> Option<&str> {
    let line = |comment: &'_ str| comment.find('\n').map_or(comment.len(), |end| end + 1);
    if let Some(comment) = text.strip_prefix("--") {
        let is_one = !mysql || comment.chars().next().is_none_or(|c| c.is_whitespace() || c.is_control());
        return is_one.then(|| &comment[line(comment)..]);
    }
    if let Some(comment) = text.strip_prefix('#').filter(|_| mysql) {
        return Some(&comment[line(comment)..]);
    }
    let comment = text.strip_prefix("/*")?;
    match comment.strip_prefix('!').or(comment.strip_prefix("M!")) {
        Some(executed) if mysql => Some(executed.trim_start_matches(|c: char| c.is_ascii_digit())),
        _ => Some(comment.split_once("*/").map_or("", |(_, rest)| rest)),
    }
}

/// What follows the statement that `text` starts with: the `;` of strings, quoted names, comments and dollar quotes does
/// not end it.
fn after_statement(text: &str, mysql: bool) -> &str {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        let before = &text[..text.len() - rest.len()];
        rest = match c {
            ';' => return after,
            '\'' | '"' if mysql => after_escaped(after, c),
            '\'' if is_escape_string(before) => after_escaped(after, c),
            '\'' | '"' | '`' => after.split_once(c).map_or("", |(_, rest)| rest),
            '-' | '#' | '/' => after_comment(rest, mysql).unwrap_or(after),
            '$' if !mysql => match after.split_once('$') {
                Some((tag, body)) if tag.chars().all(is_word) => {
                    let close = format!("${tag}$");
                    body.split_once(close.as_str()).map_or("", |(_, rest)| rest)
                }
                _ => after,
            },
            _ => after,
        };
    }
    rest
}

/// Whether PostgreSQL's `E` stands before a string.
pub(super) fn is_escape_string(before: &str) -> bool {
    before.strip_suffix(['e', 'E']).is_some_and(|before| !before.ends_with(is_word))
}

/// What follows a string in which a backslash takes the next character's meaning away.
pub(super) fn after_escaped(text: &str, quote: char) -> &str {
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        if c == '\\' {
            chars.next();
        } else if c == quote {
            return &text[at + 1..];
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::ending_word;

    #[test]
    fn plain_statements_end_nothing() {
        for sql in [
            "SELECT 1",
            "INSERT INTO t VALUES ('COMMIT; ROLLBACK')",
            "-- COMMIT\nSELECT 1",
            "/* COMMIT; */ UPDATE t SET a = 1",
            "ROLLBACK TO SAVEPOINT a",
            "ROLLBACK TRANSACTION TO a",
            "SAVEPOINT a; RELEASE SAVEPOINT a",
            "CREATE FUNCTION f() RETURNS void AS $b$ BEGIN; COMMIT; END $b$ LANGUAGE plpgsql",
            "PREPARE p AS SELECT 1",
            "INSERT INTO t VALUES (E'it\\'s; COMMIT')",
            "CREATE TRIGGER a AFTER INSERT ON b BEGIN SELECT 1; UPDATE b SET c = CASE WHEN 1 THEN 2 END; END",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END; SELECT 2",
        ] {
            assert_eq!(ending_word(sql, false), None, "{sql}");
        }
        for sql in
            ["CREATE TEMPORARY TABLE t (a INT)", "INSERT INTO t VALUES ('it\\'s; COMMIT')", "SELECT 1 # it's; COMMIT"]
        {
            assert_eq!(ending_word(sql, true), None, "{sql}");
        }
    }

    #[test]
    fn endings_are_found_wherever_they_stand() {
        for sql in [
            "COMMIT",
            " commit;",
            "SELECT ';'; rollback",
            "/* x */ END",
            "INSERT INTO t VALUES (1); COMMIT; BEGIN",
            "ROLLBACK AND CHAIN",
            "INSERT INTO t VALUES (E'\\''); COMMIT",
            "INSERT INTO t VALUES ('\\'); COMMIT",
            "CREATE TRIGGER a AFTER INSERT ON b BEGIN SELECT 1; END; COMMIT",
            "CREATE TABLE a (b INT); END",
        ] {
            assert!(ending_word(sql, false).is_some(), "{sql}");
        }
        for sql in [
            "CREATE TABLE t (a INT)",
            "START TRANSACTION",
            "TRUNCATE t",
            "SET autocommit = 1",
            "SET SESSION autocommit = 0",
            "CHECK TABLE t",
            "/*!50000 COMMIT */ # it's",
            "INSERT INTO t VALUES ('\\''); CHECK TABLE t",
        ] {
            assert_eq!(ending_word(sql, false), None, "{sql}");
            assert!(ending_word(sql, true).is_some(), "{sql}");
        }
    }
}
