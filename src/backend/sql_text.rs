//! Just enough reading of raw SQL to see a statement that ends a transaction behind Diesel's back.

/// The first words of a statement in `sql` that ends the transaction it is sent in.
///
/// `implicit` is for databases whose data definition commits by itself.
pub(crate) fn ending_word(sql: &str, implicit: bool) -> Option<String> {
    let mut rest = sql;
    loop {
        rest = skip_blank(rest);
        if rest.is_empty() {
            return None;
        }
        let (first, after) = word(rest);
        let (second, after_second) = word(skip_blank(after));
        let (third, _) = word(skip_blank(after_second));
        let ends = match first.as_str() {
            "COMMIT" | "END" | "ABORT" => true,
            "ROLLBACK" => !(second == "TO" || third == "TO"),
            "PREPARE" => second == "TRANSACTION",
            "BEGIN" => implicit,
            "START" => implicit && second == "TRANSACTION",
            "CREATE" | "DROP" => implicit && second != "TEMPORARY",
            "ALTER" | "TRUNCATE" | "RENAME" | "GRANT" | "REVOKE" | "LOCK" | "UNLOCK" | "ANALYZE" | "OPTIMIZE"
            | "CALL" => implicit,
            "SET" => implicit && second == "AUTOCOMMIT",
            _ => false,
        };
        if ends {
            return Some(first);
        }
        rest = after_statement(rest);
    }
}

/// Whether `sql` may have a part that only MySQL or MariaDB can read: a prepared text, the comments they execute, and the
/// prefix that sets a variable for one statement.
pub(crate) fn has_hidden_part(sql: &str) -> bool {
    let sql = sql.to_ascii_uppercase();
    ["EXECUTE", "/*!", "/*M!", "SET STATEMENT"].iter().any(|sign| sql.contains(sign))
}

/// Whether a statement in `sql` begins a transaction.
pub(crate) fn begins(sql: &str) -> bool {
    let mut rest = skip_blank(sql);
    while !rest.is_empty() {
        let (first, after) = word(rest);
        match first.as_str() {
            "BEGIN" | "SAVEPOINT" => return true,
            "START" if word(skip_blank(after)).0 == "TRANSACTION" => return true,
            _ => rest = skip_blank(after_statement(rest)),
        }
    }
    false
}

fn word(text: &str) -> (String, &str) {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    (text[..end].to_ascii_uppercase(), &text[end..])
}

/// `text` without leading white space, semicolons and comments.
fn skip_blank(mut text: &str) -> &str {
    loop {
        text = text.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        if let Some(comment) = text.strip_prefix("--") {
            text = comment.split_once('\n').map_or("", |(_, rest)| rest);
        } else if let Some(comment) = text.strip_prefix("/*") {
            text = comment.split_once("*/").map_or("", |(_, rest)| rest);
        } else {
            return text;
        }
    }
}

/// What follows the statement that `text` starts with: the `;` of strings, quoted names, comments and dollar quotes does
/// not end it.
fn after_statement(text: &str) -> &str {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        rest = match c {
            ';' => return after,
            '\'' | '"' | '`' => after.split_once(c).map_or("", |(_, rest)| rest),
            '-' if after.starts_with('-') => after.split_once('\n').map_or("", |(_, rest)| rest),
            '/' if after.starts_with('*') => after.split_once("*/").map_or("", |(_, rest)| rest),
            '$' => match after.split_once('$') {
                Some((tag, body)) if tag.chars().all(|c| c.is_alphanumeric() || c == '_') => {
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
        ] {
            assert_eq!(ending_word(sql, false), None, "{sql}");
        }
        assert_eq!(ending_word("CREATE TEMPORARY TABLE t (a INT)", true), None);
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
        ] {
            assert!(ending_word(sql, false).is_some(), "{sql}");
        }
        for sql in ["CREATE TABLE t (a INT)", "START TRANSACTION", "TRUNCATE t", "SET autocommit = 1"] {
            assert_eq!(ending_word(sql, false), None, "{sql}");
            assert!(ending_word(sql, true).is_some(), "{sql}");
        }
    }
}
