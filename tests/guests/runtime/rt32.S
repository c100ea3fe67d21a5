/* Start, interrupt entry and the catching of exceptions, for guests in 32-bit protected mode without paging. */

        .section .multiboot, "ax"
        .balign 4
        .long   0x1badb002, 0, -0x1badb002

        .code32
        .globl  start
start:  cli
        cld
        mov     $boot_stack_top, %esp
        mov     %ebx, boot_info
        lgdt    gdt_pointer
        ljmp    $8, $1f
1:      mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        mov     $0x600, %eax            /* OSFXSR, OSXMMEXCPT */
        mov     %eax, %cr4
        mov     $0x10033, %eax          /* WP, NE, ET, MP, PE */
        mov     %eax, %cr0
        call    rt_start
1:      hlt
        jmp     1b

        /* Entries of all vectors, 16 bytes each. */
        .balign 16
        .globl  trap_entries
trap_entries:
        .set    vector, 0
        .rept   256
        .balign 16
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
        push    $0
        .endif
        push    $vector
        jmp     trapped
        .set    vector, vector + 1
        .endr

trapped:
        pushal
        push    %ds
        push    %es
        push    %fs
        push    %gs
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        cld
        mov     %esp, %ebx
        sub     $4, %esp
        and     $-16, %esp
        mov     %ebx, (%esp)
        call    on_trap
        mov     %ebx, %esp
        pop     %gs
        pop     %fs
        pop     %es
        pop     %ds
        popal
        add     $8, %esp
        iretl

        /* word call_caught(function, argument): calls the function; a trap that on_trap gives to rt_resume ends it. */
        .globl  call_caught
call_caught:
        mov     4(%esp), %eax
        mov     8(%esp), %edx
        push    %ebx
        push    %ebp
        push    %esi
        push    %edi
        pushfl
        mov     %esp, catch_sp
        sub     $8, %esp
        push    %edx
        call    *%eax
        add     $12, %esp
        jmp     1f
        .globl  rt_resume
rt_resume:
        mov     $0x10, %ecx
        mov     %ecx, %ss
        mov     catch_sp, %esp
        mov     %ecx, %ds
        mov     %ecx, %es
1:      movl    $0, catch_sp
        popfl
        pop     %edi
        pop     %esi
        pop     %ebp
        pop     %ebx
        ret

        /* void go(struct far_state *): to another stack, code segment and ring by IRET. Ring 3 gets its data segments. */
        .globl  go
go:     mov     4(%esp), %eax
        push    12(%eax)
        push    4(%eax)
        push    16(%eax)
        push    8(%eax)
        push    0(%eax)
        mov     $0x33, %edx
        mov     %edx, %ds
        mov     %edx, %es
        mov     20(%eax), %eax
        iretl

        .data
        .balign 16
        .globl  gdt
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* 08 code */
        .quad   0x00cf93000000ffff      /* 10 data */
        .quad   0x000f9b000000ffff      /* 18 16-bit code, 1 MiB */
        .quad   0x000f93000000ffff      /* 20 16-bit data, 1 MiB */
        .quad   0x00cffb000000ffff      /* 28 user code */
        .quad   0x00cff3000000ffff      /* 30 user data */
        .fill   57, 8, 0                /* 38 ... the guest's own; from 100 on task state segments */
gdt_end:
        .globl  gdt_pointer
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
        .globl  catch_sp
catch_sp:
        .long   0

        .bss
        .balign 4096
        .skip   16384
        .globl  boot_stack_top
boot_stack_top:
        .globl  boot_info
boot_info:
        .skip   4
        .section .note.GNU-stack, "", @progbits
