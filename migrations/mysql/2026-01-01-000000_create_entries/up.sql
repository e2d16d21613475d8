-- Character set and collation are this table's own: the server's may lack most characters, or take some for nothing.
CREATE TABLE entries (
    id INTEGER NOT NULL AUTO_INCREMENT PRIMARY KEY,
    author VARCHAR(100) NOT NULL CHECK (author <> ''),
    message VARCHAR(2000) NOT NULL CHECK (message <> ''),
    -- A moment, which Diesel's connections read in UTC.
    written_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
) DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
