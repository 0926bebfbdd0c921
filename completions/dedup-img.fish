# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_dedup_img_global_optspecs
    string join \n h/help V/version
end

function __fish_dedup_img_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_dedup_img_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_dedup_img_using_subcommand
    set -l cmd (__fish_dedup_img_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c dedup-img -n "__fish_dedup_img_needs_command" -s h -l help -d 'Print help'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -s V -l version -d 'Print version'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "create" -d 'Create a new, empty image that is ready for deduplication'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "convert" -d 'Convert an image into a deduplicated QCOW2, a plain one, or raw'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "dedup" -d 'Deduplicate a QCOW2 image in place, and give the space back'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "gc" -d 'Give back what a QCOW2 image does not use; compact its file'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "check" -d 'Check a QCOW2 image, more closely than qemu-img; repair it'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "stats" -d 'Say what is duplicated in images, and what sharing saves'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "completions" -d 'Print a completion script for a shell'
complete -c dedup-img -n "__fish_dedup_img_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s f -l format -d 'Format of the image, which is always qcow2' -r -f -a "qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s o -l options -d 'Image options; \'-o help\' lists them' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s b -l backing -d 'Backing file; its name is stored as given' -r -F
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s F -l backing-format -d 'Format of the backing file' -r -f -a "raw\t''
qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -l backing-dir -d 'Follow \'..\' and links in names, inside DIR' -r -f -a "(__fish_complete_directories)"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s f -l source-format -d 'Format [default: found by the content]' -r -f -a "raw\t''
qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s l -l source-snapshot -d 'An internal snapshot, by id or name' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l backing-dir -d 'Follow \'..\' and links in names, inside DIR' -r -f -a "(__fish_complete_directories)"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s O -l target-format -d 'Format' -r -f -a "qcow2\t''
raw\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s o -l target-options -d 'Image options; \'-o help\' lists them' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s B -l backing -d 'Make an overlay of this backing file' -r -F
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s F -l backing-format -d 'Its format' -r -f -a "raw\t''
qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l compression-level -d '1 to 9 (zlib) or 19 (zstd) [default: 6, 3]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l pin -d 'Which clusters to pool [default: shared]' -r -f -a "shared\t''
all\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l memory -d 'Memory for tables' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l threads -d 'Worker threads [default: one for each processor]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l output -d 'How to print the result' -r -f -a "human\t''
json\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s T -l source-cache -d 'Cache mode; none: not in the page cache' -r -f -a "writeback\t''
writethrough\t''
none\t''
off\t''
directsync\t''
unsafe\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s t -l target-cache -d 'Cache mode; unsafe: it is not flushed' -r -f -a "writeback\t''
writethrough\t''
none\t''
off\t''
directsync\t''
unsafe\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s S -l sparse-size -d 'Zeros that are a hole in raw [default: 4k]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s r -l rate -d 'Bytes to write in a second, at most' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s m -l parallel -d 'The same as --threads, from 1 to 16' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l all-snapshots -d 'The disk with all its internal snapshots'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s U -l force-share -d 'Read though another program may write'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l no-backing -d 'Refuse what needs a backing file'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l ignore-holes -d 'Read what is said to be a hole, too'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s c -l compress -d 'Compress what becomes smaller by it'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s n -l no-create -d 'Write what differs into an existing image'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l plain -d 'Share nothing: an image as of qemu-img'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s p -l progress -d 'Show progress'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l salvage -d 'Take zeros for what cannot be read'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s W -l oob-writes -d 'Write out of order, which is always done'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -l target-is-zero -d 'With -n: it is all zeros; not relied on'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand convert" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -s f -l format -d 'Format [default: found by the content]' -r -f -a "qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l pin -d 'Which clusters to pool [default: shared]' -r -f -a "shared\t''
all\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l memory -d 'Memory for tables' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l threads -d 'Worker threads [default: one for each processor]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l output -d 'How to print the result' -r -f -a "human\t''
json\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l ignore-holes -d 'Read what is said to be a hole, too'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -l dry-run -d 'Say what would be done, and write nothing'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -s p -l progress -d 'Show progress'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand dedup" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -s f -l format -d 'Format [default: found by the content]' -r -f -a "qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l memory -d 'Memory for tables' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l threads -d 'Worker threads [default: one for each processor]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l output -d 'How to print the result' -r -f -a "human\t''
json\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l dry-run -d 'Say what would be done, and write nothing'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l compact -d 'Move clusters from the end of the file into holes, and cut it'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -l drop-pool -d 'Remove the deduplication pool; what is shared stays shared'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -s p -l progress -d 'Show progress'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand gc" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s f -l format -d 'Format [default: found by the content]' -r -f -a "qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s r -l repair -d 'Repair leaks, or all that can be repaired' -r -f -a "leaks\t''
all\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -l threads -d 'Worker threads [default: one for each processor]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -l output -d 'How to print the result' -r -f -a "human\t''
json\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s T -l cache -d 'Cache mode; none: not in the page cache' -r -f -a "writeback\t''
writethrough\t''
none\t''
off\t''
directsync\t''
unsafe\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s U -l force-share -d 'Check though another program may write'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -l data -d 'Compare every pooled cluster with its SHA-256'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s p -l progress -d 'Show progress'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -s f -l format -d 'Format [default: found by the content of each]' -r -f -a "raw\t''
qcow2\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l backing-dir -d 'Follow \'..\' and links in names, inside DIR' -r -f -a "(__fish_complete_directories)"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l cluster-size -d 'Size of a content [default: the image\'s, or 4k]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l top -d 'Frequent contents to list [default: 10]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l max-duplicate -d 'Fail if more than this is stored again' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l min-saved -d 'Fail if sharing saves less than this' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l memory -d 'Memory for tables' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l threads -d 'Worker threads [default: one for each processor]' -r -f
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l locking -d 'Lock images; off: at your risk' -r -f -a "auto\t''
on\t''
off\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l output -d 'How to print the result' -r -f -a "human\t''
json\t''"
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -s U -l force-share -d 'Read though another program may write'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l no-backing -d 'Refuse what needs a backing file'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l quick -d 'Answer from metadata, without reading data'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -l no-curve -d 'Leave out the other cluster sizes'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -s p -l progress -d 'Show progress'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -s q -l quiet -d 'Print nothing but errors'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand stats" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand completions" -s h -l help -d 'Print help'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "create" -d 'Create a new, empty image that is ready for deduplication'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "convert" -d 'Convert an image into a deduplicated QCOW2, a plain one, or raw'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "dedup" -d 'Deduplicate a QCOW2 image in place, and give the space back'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "gc" -d 'Give back what a QCOW2 image does not use; compact its file'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "check" -d 'Check a QCOW2 image, more closely than qemu-img; repair it'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "stats" -d 'Say what is duplicated in images, and what sharing saves'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "completions" -d 'Print a completion script for a shell'
complete -c dedup-img -n "__fish_dedup_img_using_subcommand help; and not __fish_seen_subcommand_from create convert dedup gc check stats completions help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
